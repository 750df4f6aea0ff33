"""Machine code as C++: what kernels/cubin.h describes, for one line of instances.def.

usage: embed_code.py LINE OUTPUT.cpp SM=MIN_DRIVER=FILE...

FILE is a cubin, or PTX for the emulator, which looks at the names alone. Several lines may hold the
same kernel (combine_kernel), so that the linker may take either.
"""

from __future__ import annotations

import pathlib
import re
import sys


def kernel_names(code: bytes) -> list[str]:
    """The mangled names of a file's kernels."""
    if code.startswith(b"\x7fELF"):
        found = re.findall(rb"\.text\.(\w+)\0", code)  # a section each
    else:
        found = re.findall(rb"\.entry (\w+)\(", code)
    return sorted({name.decode() for name in found})


def source(line: str, codes: list[tuple[int, int, pathlib.Path]]) -> str:
    """The file's text; codes: (sm, min_driver, path)."""
    text = ['#include "kernels/cubin.h"', "", "namespace anyflash {", ""]
    symbols = {
        path: f"code_{line}_{n}" for n, path in enumerate(dict.fromkeys(c[2] for c in codes))
    }
    for path, symbol in symbols.items():
        where = f'.section .rodata\\n.balign 64\\n{symbol}: .incbin \\"{path}\\"\\n.byte 0\\n.previous\\n'
        text += [f'asm("{where}");', f'extern const char {symbol}[] asm("{symbol}");']
    rows = [f"{{{sm}, {driver}, {symbols[p]}, {p.stat().st_size}}}" for sm, driver, p in codes]
    text.append(f"extern const Cubin cubins_{line}[] = {{{', '.join(rows)}, {{}}}};")
    names = sorted({name for path in symbols for name in kernel_names(path.read_bytes())})
    for number, name in enumerate(names):
        text.append(f'extern const GpuKernel kernel_{number} asm("{name}") __attribute__((weak));')
        text.append(f'const GpuKernel kernel_{number} = {{"{name}", cubins_{line}}};')
    return "\n".join([*text, "", "}  // namespace anyflash", ""])


def main(line: str, output: str, *codes: str) -> None:
    rows = []
    for code in codes:
        sm, driver, path = code.split("=", 2)
        rows.append((int(sm), int(driver), pathlib.Path(path)))
    pathlib.Path(output).write_text(source(line, rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
