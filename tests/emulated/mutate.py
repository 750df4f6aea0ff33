"""Breaks the kernels on purpose, once per barrier, wait and bound check, and sees that it shows.

python tests/emulated/mutate.py BUILD [--only TEXT] [--jobs N] [--list]

BUILD is a CMake build folder with the programs emulate_attention and emulate_kvcache_append. Each
mutant is compiled like the kernels of those programs (NVRTC, ptx_to_cpp, C++) and put in their
place by LD_PRELOAD: the kernels that register last count. A mutant is killed by a report of the
emulator or by a wrong result. One that survives must stand in EQUIVALENT with the reason why
nothing can show, or compile to the same PTX; else the exit status is 1.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mutate_equivalent import EQUIVALENT

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "scripts"), str(ROOT / "tools")]

from sass import compile_cuda  # noqa: E402

from nvrtc import NvrtcError  # noqa: E402

COMPILER = shutil.which("clang++") or "c++"  # compiles faster
COMPILE = (COMPILER, "-std=c++17", "-O0", "-g1", "-ffp-contract=off", "-fPIC", "-shared")
SECONDS = 300  # a mutant that runs longer hangs


class Probe(NamedTuple):
    """Kernels to compile, and the command that runs them."""

    source: str
    command: tuple[str, ...]
    arch: str = "compute_80"


def attention_probe(
    head_dim: int,
    *kernels: str,
    dtype: str = "bf16",
    sm: int = 80,
    direction: str = "forward",
    every: int = 1,
) -> Probe:
    """Kernels of one instance, in the words of their template arguments, on every so many cases."""
    lines = [f"template __global__ void {kernel};" for kernel in kernels]
    text = "\n".join(lines).replace("T_D_D", f"{dtype}, {head_dim}, {head_dim}")
    source = '#include "kernels/sm80/attention_backward.cuh"\n'  # and the forward's
    source += f"namespace anyflash::sm80 {{\n{text}\n}}\n"
    instance = f"{direction}_{dtype}_d{head_dim}_sm{sm}"
    command = ("emulate_attention", "--instance", instance, "--stop-early", "--runs", "1")
    return Probe(source, (*command, "--every", str(every)), f"compute_{sm}")


QUICK = (
    "forward_kernel<T_D_D, Extras::none, false, 100>(const Arguments)",
    "decode_kernel<T_D_D, Extras::none, false>(const Arguments)",
    "combine_kernel<bf16>(const Arguments)",
)
ALL = (
    *QUICK,
    "forward_kernel<T_D_D, Extras::none, true, 100>(const Arguments)",
    "forward_kernel<T_D_D, Extras::score_mod, false, 100>(const Arguments)",
    "forward_kernel<T_D_D, Extras::dropout, false, 100>(const Arguments)",
    "forward_kernel<T_D_D, Extras::all, false, 100>(const Arguments)",
    "forward_kernel<T_D_D, Extras::all, true, 100>(const Arguments)",
    "decode_kernel<T_D_D, Extras::none, true>(const Arguments)",
    "decode_kernel<T_D_D, Extras::score_mod, false>(const Arguments)",
    "decode_kernel<T_D_D, Extras::score_mod, true>(const Arguments)",
)
# A mutant that survives one probe meets the next.
ATTENTION = (attention_probe(64, *QUICK), attention_probe(96, *ALL))
SM75 = (
    attention_probe(
        64,
        "forward_kernel<T_D_D, Extras::none, false, 64>(const Arguments)",
        "forward_kernel<T_D_D, Extras::all, true, 64>(const Arguments)",
        dtype="fp16",
        sm=75,
    ),
)
QUICK_BACKWARD = (
    "prepare_kernel<T_D_D>(const BackwardArguments)",
    "sinks_kernel<bf16>(const BackwardArguments)",
    "keys_kernel<T_D_D, Extras::none, 100>(const BackwardArguments)",
    "keys_kernel<T_D_D, Extras::none, 164>(const BackwardArguments)",
    "queries_kernel<T_D_D, Extras::none, 100>(const BackwardArguments)",
    "finish_kernel<bf16, 64, 100>(const BackwardArguments)",
)
ALL_BACKWARD = (
    *QUICK_BACKWARD,
    "far_rows_kernel<bf16>(const BackwardArguments)",
    "keys_kernel<T_D_D, Extras::score_mod, 100>(const BackwardArguments)",
    "keys_kernel<T_D_D, Extras::score_mod, 164>(const BackwardArguments)",
    "keys_kernel<T_D_D, Extras::dropout, 100>(const BackwardArguments)",
    "keys_kernel<T_D_D, Extras::dropout, 164>(const BackwardArguments)",
    "keys_kernel<T_D_D, Extras::all, 100>(const BackwardArguments)",
    "queries_kernel<T_D_D, Extras::all, 100>(const BackwardArguments)",
)
BACKWARD = (
    attention_probe(64, *QUICK_BACKWARD, direction="backward"),
    attention_probe(64, *ALL_BACKWARD, direction="backward"),
)
BACKWARD_SM75 = (
    attention_probe(
        64,
        "prepare_kernel<T_D_D>(const BackwardArguments)",
        "keys_kernel<T_D_D, Extras::none, 64>(const BackwardArguments)",
        "keys_kernel<T_D_D, Extras::all, 64>(const BackwardArguments)",
        "queries_kernel<T_D_D, Extras::none, 64>(const BackwardArguments)",
        dtype="fp16",
        sm=75,
        direction="backward",
    ),
)
# Values in registers that lay where more than probabilities come to lie.
BACKWARD_WIDE = (
    attention_probe(
        192,
        "prepare_kernel<T_D_D>(const BackwardArguments)",
        "keys_kernel<T_D_D, Extras::none, 100>(const BackwardArguments)",
        direction="backward",
        every=9,
    ),
)
KVCACHE_APPEND = (
    Probe(
        """#include "kernels/elementwise/kvcache_append.cuh"
namespace anyflash::kvcache_append {
template __global__ void kernel<bf16, 8>(KvcacheAppendParams);
template __global__ void kernel<bf16, 1>(KvcacheAppendParams);
template __global__ void kernel<fp32, 4>(KvcacheAppendParams);
}
""",
        ("emulate_kvcache_append",),
    ),
)

FILES = {
    "kernels/sm80/forward.cuh": ATTENTION + SM75,
    "kernels/sm80/decode.cuh": ATTENTION,
    "kernels/sm80/combine.cuh": ATTENTION,
    "kernels/sm80/block.cuh": ATTENTION + BACKWARD,
    "kernels/sm80/key_tiles.cuh": ATTENTION + SM75,
    "kernels/sm80/backward_keys.cuh": BACKWARD + BACKWARD_SM75 + BACKWARD_WIDE,
    "kernels/sm80/backward_queries.cuh": BACKWARD + BACKWARD_SM75,
    "kernels/sm80/backward_rows.cuh": BACKWARD,
    "kernels/sm80/backward_far_rows.cuh": BACKWARD,
    "kernels/sm80/gradients.cuh": BACKWARD,
    "kernels/common/tile_copy.cuh": ATTENTION + SM75,
    "kernels/common/sequence.cuh": ATTENTION + BACKWARD,
    "kernels/lengths.h": ATTENTION,
    "kernels/common/scores.cuh": ATTENTION,
    "kernels/common/online_softmax.cuh": ATTENTION,
    "kernels/elementwise/kvcache_append.cuh": KVCACHE_APPEND,
}

# What follows is host code.
HOST_CODE = re.compile(r"^(int32_t launch_|// ---- launcher)", re.MULTILINE)

COMPILE_TIME = ("template", "static_assert", "static constexpr", "constexpr", "if constexpr")

# Pattern and what takes its place; groups as in re.sub.
REPLACEMENTS = (
    (r"__syncthreads\(\);", ";"),
    (r"__syncwarp\(\);", ";"),
    (r"ptx::cp_async_commit\(\);", ";"),
    (r"ptx::cp_async_wait<\d>\(\);", ";"),
    (r"ptx::cp_async_wait<(\d)>\(\);", r"ptx::cp_async_wait<\1 + 1>();"),
    (r" < ", " <= "),
    (r" > ", " >= "),
    (r" <= ", " < "),
    (r" >= ", " > "),
    (r"<false>(?=\()", "<true>"),
    (r"<true>(?=\()", "<false>"),
    (r"<!kMasked>(?=\()", "<true>"),
)


class Mutation(NamedTuple):
    file: str
    line: int
    before: str  # the line
    after: str
    text: str  # the whole file


class Original(NamedTuple):
    """A probe of the unchanged kernels."""

    ptx: str
    recent: deque[str]  # of killer()


def closing(text: str, opening: int) -> int:
    """Where the bracket that opens there is closed."""
    depth = 0
    for at in range(opening, len(text)):
        depth += (text[at] in "([{") - (text[at] in ")]}")
        if depth == 0:
            return at
    raise ValueError("unbalanced brackets")


def operand(text: str, at: int, step: int) -> tuple[int, int]:
    """Begin and end of what stands before (step -1) or behind (1) a logical operator or a ?."""
    depth, first = 0, at
    while True:
        depth += step * ((text[at] in "([{") - (text[at] in ")]}"))
        assignment = text[at] == "=" and not ({text[at - 1], text[at + 1]} & set("=<>!"))
        separator = text[at] in "?;:," or assignment or text[at : at + 2] in ("&&", "||")
        if depth < 0 or (depth == 0 and separator and text[at - 1 : at + 2].count(":") < 2):
            break
        at += step
    begin, end = (at + 1, first + 1) if step < 0 else (first, at)
    begin += len(text[begin:end]) - len(text[begin:end].lstrip("&| \n"))
    if text[begin:end].startswith("return "):
        begin += len("return ")
    return begin, begin + len(text[begin:end].rstrip())


def arguments_of(text: str, opening: int) -> list[str]:
    """The arguments of the call whose bracket opens there."""
    parts, depth = [""], 0
    for character in text[opening + 1 : closing(text, opening)]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def edits(text: str) -> Iterator[tuple[int, int, str]]:
    """Begin, end and replacement of every mutation of a text without comments."""
    for pattern, replacement in REPLACEMENTS:
        for found in re.finditer(pattern, text):
            yield found.start(), found.end(), found.expand(replacement)
    for found in re.finditer(r"\bif (?=\()", text):
        end = closing(text, found.end()) + 1
        exits = re.match(r" (return|continue|break)\b", text[end:])
        yield found.end(), end, "(false)" if exits else "(true)"
    for found in re.finditer(r" (?:&&|\|\|)\s", text):
        neutral = "true" if "&&" in found[0] else "false"
        for step, at in ((-1, found.start() - 1), (1, found.end())):
            yield *operand(text, at, step), neutral
    for found in re.finditer(r"\s\? ", text):
        condition = operand(text, found.start() - 1, -1)
        yield *condition, "true"
        yield *condition, "false"
    for found in re.finditer(r"\b(?:smaller|larger)(?:<\w+>)?(?=\()", text):
        for argument in arguments_of(text, found.end()):
            yield found.start(), closing(text, found.end()) + 1, f"({argument})"


def mutations(file: str) -> list[Mutation]:
    """All mutations of a file, in its order."""
    text = (ROOT / file).read_text()
    device = HOST_CODE.split(text)[0]
    code = re.sub(r"//.*|^#.*", lambda comment: " " * len(comment[0]), device, flags=re.MULTILINE)
    lines = text.splitlines()
    constant = {n + 2 for n, line in enumerate(lines) if "#pragma unroll" in line}
    found: dict[tuple[int, str], Mutation] = {}
    for begin, end, replacement in edits(code):
        line = text.count("\n", 0, begin) + 1
        here = lines[line - 1]
        if "Extras::" in text[begin:end] or here.lstrip().startswith(COMPILE_TIME):
            continue
        if line in constant and "for (" in here and text[begin:end] in (" < ", " > "):
            continue
        mutated = text[:begin] + replacement + "\n" * text.count("\n", begin, end) + text[end:]
        after = mutated.splitlines()[line - 1].strip()
        if after != here.strip():
            found.setdefault(
                (begin, replacement), Mutation(file, line, here.strip(), after, mutated)
            )
    return [found[key] for key in sorted(found)]


def run(*command: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Status and output; -1 for a command that hangs."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return -1, ""
    return done.returncode, done.stdout


def compile_ptx(probe: Probe, folder: Path) -> str | None:
    """The probe's PTX in folder/kernels.ptx, returned without what only says where it comes from;
    None: an error."""
    options = (f"-I{folder}", "-lineinfo")
    try:
        ptx, _ = compile_cuda(probe.source, folder, "kernels", probe.arch, options)
    except NvrtcError:
        return None
    code = ptx.read_text().split("\n\t.section")[0]  # behind it, debug information
    code = re.sub(r"_kernels_cu_[0-9a-f]{8}_", "_", code)  # in names, a digest of the source
    return re.sub(r"^\s*(\.loc|\.file|//).*$", "", code, flags=re.MULTILINE)


def killer(build: Path, probe: Probe, folder: Path, recent: deque[str]) -> str | None:
    """What killed the kernels in folder/kernels.ptx; None if they pass. `recent`: the probe's cases
    that killed last, which are tried first, since mutants of one place die of the same."""
    translated, library = folder / "kernels.cpp", folder / "libmutant.so"
    path = {"PYTHONPATH": str(ROOT / "emulator")}
    arguments = (str(folder / "kernels.ptx"), str(translated))
    status, output = run(sys.executable, "-m", "ptx_to_cpp", *arguments, environment=path)
    if status == 0:
        # The emulator asks addr2line, which is preloaded into as well.
        emulator = build / "emulator"
        link = (f"{emulator}/libemulator.so", f"-Wl,-rpath,{emulator}")
        status, output = run(*COMPILE, f"-I{ROOT}", "-o", str(library), str(translated), *link)
    if status != 0:
        raise RuntimeError(output)
    program, *options = probe.command
    preload = {"LD_PRELOAD": str(library)}
    for case in (*recent, None):
        chosen = () if case is None else ("--case", case)
        command = (str(build / "tests/emulated" / program), *options, *chosen)
        status, output = run(*command, environment=preload)
        if status != 0:
            break
    else:
        return None
    if (failed := re.search(r"^\w+, (.+), run \d+ \(", output, re.MULTILINE)) and case is None:
        recent.appendleft(failed[1])
    report = re.search(r"\[([a-zA-Z-]+)\] ", output)
    return "hangs" if status == -1 else report[1] if report else "crash" if status < 0 else "values"


def judge(build: Path, mutation: Mutation, originals: dict[Probe, Original]) -> str | None:
    """What kills a mutant; None if nothing does."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target = folder / mutation.file
        target.parent.mkdir(parents=True)
        target.write_text(mutation.text)
        same = True
        for probe in FILES[mutation.file]:
            ptx = compile_ptx(probe, folder)
            if ptx is None:
                return "compiler"
            if ptx == originals[probe].ptx:
                continue
            same = False
            if found := killer(build, probe, folder, originals[probe].recent):
                return found
    return "same PTX" if same else None


def originals_of(build: Path, files: set[str]) -> dict[Probe, Original]:
    """These files' unchanged probes, which must pass."""
    originals = {}
    for probe in dict.fromkeys(probe for file in FILES if file in files for probe in FILES[file]):
        with tempfile.TemporaryDirectory() as name:
            ptx = compile_ptx(probe, Path(name))
            found = "compiler" if ptx is None else killer(build, probe, Path(name), deque())
            if found:
                raise SystemExit(f"the unchanged kernels fail: {found}\n{probe.source}")
            originals[probe] = Original(ptx, deque(maxlen=6))
    return originals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("--only", default="", help="mutations whose place or code has this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--list", action="store_true", help="the mutations, without trying them")
    options = parser.parse_args()
    found = [m for file in FILES for m in mutations(file)]
    found = [m for m in found if options.only in f"{m.file}:{m.line} {m.before} -> {m.after}"]
    files = {mutation.file for mutation in found}
    originals = {} if options.list else originals_of(options.build.resolve(), files)

    def result(mutation: Mutation) -> str:
        if options.list:
            return ""
        outcome = judge(options.build.resolve(), mutation, originals)
        reason = EQUIVALENT.get((Path(mutation.file).name, mutation.before, mutation.after))
        return outcome or (f"equivalent: {reason}" if reason else "SURVIVED")

    survivors = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for mutation, outcome in zip(found, pool.map(result, found)):
            survivors += outcome == "SURVIVED"
            place = f"{mutation.file}:{mutation.line}"
            print(f"{place}: {outcome}\n    {mutation.before}\n    {mutation.after}", flush=True)
    print(f"{len(found)} mutants, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
