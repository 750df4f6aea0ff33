"""Machine code as C++: what kernels/cubin.h describes, for one line of instances.def.

usage: embed_code.py LINE OUTPUT (SM MIN_DRIVER FILE LIKE)...

FILE is a cubin, or PTX for the emulator, which looks at the names alone. LIKE is another line's, or
FILE itself: of a file that differs from it in few bytes only these are kept. Several lines may hold
the same kernel (combine_kernel), so that the linker may take either.
"""

from __future__ import annotations

import hashlib
import pathlib
import re
import sys
from typing import NamedTuple

CHECKED = pathlib.Path(__file__).resolve().parents[1] / "kernels/checked.def"
LARGEST = 1 << 24  # whose offsets a change can say


class Code(NamedTuple):
    """Machine code for one architecture."""

    sm: int
    min_driver: int
    path: pathlib.Path
    like: pathlib.Path


def kernel_names(code: bytes) -> list[str]:
    """The mangled names of a file's kernels."""
    if code.startswith(b"\x7fELF"):
        found = re.findall(rb"\.text\.(\w+)\0", code)  # a section each
    else:
        found = re.findall(rb"\.entry (\w+)\(", code)
    return sorted({name.decode() for name in found})


def changes(code: bytes, like: bytes) -> list[int] | None:
    """What makes `code` of `like`, as kernels/cubin.h keeps it; None: not worth it."""
    if len(code) != len(like) or len(code) > LARGEST:
        return None
    found = [at << 8 | ours for at, (ours, theirs) in enumerate(zip(code, like)) if ours != theirs]
    return found if 4 * len(found) < len(code) // 4 else None


def checked_on(line: str, code: bytes, records: str) -> list[int]:
    """The GPUs on which this code passed, by the text of checked.def."""
    digest = hashlib.sha256(code).hexdigest()[:16]
    found = re.findall(rf"^CHECKED\({line}, (\d+), {digest}\)$", records, re.MULTILINE)
    return sorted(map(int, found))


def symbol(path: pathlib.Path) -> str:
    """Of a file's bytes."""
    return "code_" + re.sub(r"\W", "_", path.name)


def embedded(path: pathlib.Path) -> list[str]:
    """A file's bytes, which other files of the library may refer to."""
    name, digest = symbol(path), hashlib.sha256(path.read_bytes()).hexdigest()
    section = f".section .rodata\\n.balign 64\\n.globl {name}\\n.hidden {name}\\n{name}: "
    # Caches of compilers compare texts, which do not have the bytes.
    return [f"// {digest}", f'asm("{section}.incbin \\"{path}\\"\\n.byte 0\\n.previous\\n");']


def source(line: str, codes: list[Code]) -> str:
    """The file's text."""
    declared: dict[pathlib.Path, None] = {}
    text, rows, names = [], [], set()
    records = CHECKED.read_text()
    for code in codes:
        data = code.path.read_bytes()
        names.update(kernel_names(data))
        found = changes(data, code.like.read_bytes()) if code.like != code.path else None
        holder = code.path if found is None else code.like
        if found is None and holder not in declared:
            text += embedded(holder)
        declared[holder] = None
        row = f"{code.sm}, {code.min_driver}, {symbol(holder)}, {len(data)}"
        array, gpus = "nullptr", "nullptr"
        if found:
            array = f"changes_{code.sm}"
            text.append(f"const uint32_t {array}[] = {{{', '.join(map(hex, found))}}};")
        if passed := checked_on(line, data, records):
            gpus = f"checked_on_{code.sm}"
            text.append(f"const int32_t {gpus}[] = {{{', '.join(map(str, passed))}, 0}};")
        rows.append(f"{{{row}, {array}, {len(found or [])}, {gpus}}}")
    head = ['#include "kernels/cubin.h"', "", "namespace anyflash {", ""]
    head += [f'extern const char {symbol(path)}[] asm("{symbol(path)}");' for path in declared]
    text.append(f"extern const Cubin cubins_{line}[] = {{{', '.join(rows)}, {{}}}};")
    for number, name in enumerate(sorted(names)):
        text.append(f'extern const GpuKernel kernel_{number} asm("{name}") __attribute__((weak));')
        text.append(f'const GpuKernel kernel_{number} = {{"{name}", cubins_{line}}};')
    return "\n".join([*head, *text, "", "}  // namespace anyflash", ""])


def main(line: str, output: str, *words: str) -> None:
    codes = [
        Code(int(sm), int(driver), pathlib.Path(path), pathlib.Path(like))
        for sm, driver, path, like in zip(*[iter(words)] * 4)
    ]
    pathlib.Path(output).write_text(source(line, codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
