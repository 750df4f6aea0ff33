"""Writes docs/kernels/sm80_registers.md: registers and shared memory of the sm_80 kernels.

    python scripts/sm80_registers.py           # write
    python scripts/sm80_registers.py --check   # exit 1 if the page is not current

Compiles the instances of kernels/instances.def for sm_80, which needs nvcc.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

from sass import Resources, find_tool, parse_ptxas

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
PAGE = CHECKOUT / "docs/kernels/sm80_registers.md"

EXTRAS = ("plain", "score_mod", "dropout", "everything")  # by the numbers of Extras

# Of a multiprocessor: bytes of shared memory (1 KB of which goes with each block), threads, blocks.
MULTIPROCESSORS = {"A100": (164 << 10, 2048, 32), "RTX 30, RTX 40": (100 << 10, 1536, 16)}
REGISTERS = 65536


class Kernel(NamedTuple):
    """One kernel of an instance, in the words of the page."""

    dtype: str
    head_dim: int
    head_dim_v: int
    kind: str  # forward, decode, combine
    extras: int
    paged: bool
    shared_kb: int  # of the multiprocessors that it is for; 0: of any

    @classmethod
    def from_mangled(cls, name: str) -> Kernel:
        kind, dtype, arguments = re.search(r"([a-z]+)_kernelINS_4(\w{4})E(\w*?)EEv", name).groups()
        numbers = [int(x) for x in re.findall(r"(?:Li|ExtrasE|Lb)(\d+)E", arguments + "E")]
        if kind == "combine":  # one for all
            numbers = []
        head_dim, head_dim_v, extras, paged, shared_kb = (*numbers, 0, 0, 0, 0, 0)[:5]
        return cls(dtype, head_dim, head_dim_v, kind, extras, bool(paged), shared_kb)

    def label(self) -> str:
        """The first cell of its row."""
        size = f" {self.head_dim}" if self.head_dim else ""
        if self.head_dim_v != self.head_dim:
            size += f"/{self.head_dim_v}"
        extras = "" if self.kind == "combine" else f" {EXTRAS[self.extras]}"
        large = f" {self.shared_kb} KB" if self.shared_kb > 100 else ""
        return f"{self.kind} {self.dtype}{size}{extras}{' paged' if self.paged else ''}{large}"

    def tile(self) -> str:
        """The C++ class with its numbers."""
        arguments = f"{self.dtype}, {self.head_dim}, {self.head_dim_v}, Extras({self.extras})"
        arguments += f", {'true' if self.paged else 'false'}"
        if self.kind == "forward":
            return f"ForwardTile<{arguments}, {self.shared_kb}>"
        return f"DecodeTile<{arguments}>"


class Compiled(NamedTuple):
    """An instance compiled for sm_80."""

    resources: list[Resources]
    cubin: pathlib.Path
    log: str


def instances() -> dict[str, str]:
    """dtype_d<head_dim> -> line of instances.def."""
    text = (CHECKOUT / "kernels/instances.def").read_text()
    lines = re.findall(r"^(ATTENTION\(sm80, forward, (\w+), (\d+),.*)$", text, re.MULTILINE)
    return {f"{dtype}_d{head_dim}": line for line, dtype, head_dim in lines}


def tile_shapes() -> dict[tuple[int, int], tuple[int, int, int]]:
    """(head_dim, shared_kb) -> rows, keys, warps: the lines of tiles.def."""
    text = (CHECKOUT / "kernels/sm80/tiles.def").read_text()
    lines = re.findall(r"^TILE\((\d+), (\d+), (\d+), (\d+), (\d+)\)", text, re.MULTILINE)
    numbers = [tuple(map(int, line)) for line in lines]
    return {(line[0], line[1]): line[2:] for line in numbers}


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]}: {done.stderr}")
    return done.stdout + done.stderr


def nvcc(source: str, folder: pathlib.Path, name: str, *options: str) -> tuple[pathlib.Path, str]:
    """Compiles CUDA source; the output and what the compiler said."""
    (folder / f"{name}.cu").write_text(source)
    output = folder / f"{name}.{'ptx' if '-ptx' in options else 'cubin'}"
    command = [find_tool("nvcc") or "nvcc", "-std=c++17", f"-I{CHECKOUT}", *options]
    return output, run(*command, "-o", str(output), str(folder / f"{name}.cu"))


def compile_instance(name: str, folder: pathlib.Path) -> Compiled:
    """One translation unit as kernels/CMakeLists.txt makes it."""
    source = (CHECKOUT / "kernels/instance.cu.in").read_text()
    source = source.replace("@HEADER@", "kernels/sm80/attention.cuh")
    source = source.replace("@INSTANCES@", instances()[name]).replace("@FAMILY@", name)
    cubin, log = nvcc(source, folder, name, "-arch=sm_80", "-cubin", "-Xptxas=-v")
    return Compiled(parse_ptxas(log), cubin, log)


def tile_sizes(kernels: list[Kernel], folder: pathlib.Path) -> dict[Kernel, tuple[int, int]]:
    """(threads, bytes of shared memory) by kernel: constants of their classes, read from PTX."""
    tiled = [kernel for kernel in kernels if kernel.kind != "combine"]
    lines = [
        f"__device__ int {word}_{number} = {kernel.tile()}::k{word};"
        for number, kernel in enumerate(tiled)
        for word in ("Threads", "SharedBytes")
    ]
    body = "\n".join(lines)
    source = f'#include "kernels/sm80/attention.cuh"\nnamespace anyflash::sm80 {{\n{body}\n}}\n'
    ptx, _ = nvcc(source, folder, "sizes", "-ptx", "-arch=compute_80")
    pattern = r"((?:Threads|SharedBytes)_\d+)E? = (\d+)"
    found = {name: int(value) for name, value in re.findall(pattern, ptx.read_text())}
    sizes = {
        kernel: (found[f"Threads_{number}"], found[f"SharedBytes_{number}"])
        for number, kernel in enumerate(tiled)
    }
    return {kernel: sizes.get(kernel, (128, 0)) for kernel in kernels}


def blocks(registers: int, threads: int, shared: int, multiprocessor: tuple[int, int, int]) -> int:
    """Blocks that a multiprocessor holds at a time."""
    shared_limit, thread_limit, block_limit = multiprocessor
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    return min(by_registers, shared_limit // (shared + 1024), thread_limit // threads, block_limit)


def rows(compiled: list[Compiled], folder: pathlib.Path) -> list[str]:
    """The table's rows of these instances."""
    resources = {
        Kernel.from_mangled(entry.name): entry
        for instance in compiled
        for entry in instance.resources
    }
    sizes = tile_sizes(list(resources), folder)
    lines = []
    for kernel in sorted(resources, key=lambda k: (k.kind, k.dtype, k)):
        entry, (threads, shared) = resources[kernel], sizes[kernel]
        held = [
            str(blocks(entry.registers, threads, shared, multiprocessor))
            for multiprocessor in MULTIPROCESSORS.values()
        ]
        cells = (entry.registers, entry.spilled_bytes, threads, shared, *held)
        lines.append(f"| {kernel.label()} | {' | '.join(map(str, cells))} |")
    return lines


def missing(there: list[str]) -> list[str]:
    """Rows that the page does not have."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    return [row for row in there if row not in lines]


def page(table: list[str]) -> str:
    held = " | ".join(f"blocks, {name}" for name in MULTIPROCESSORS)
    return "\n".join(
        (
            "# Registers and shared memory of the sm_80 kernels",
            "",
            "Written by `python scripts/sm80_registers.py`, compiled for sm_80. Names are kind,",
            "dtype, head_dim and extras (`kernels/common/scores.cuh`); blocks are those that a",
            "multiprocessor holds at a time.",
            "",
            f"| kernel | registers | spilled bytes | threads | shared memory | {held} |",
            "|---" * (5 + len(MULTIPROCESSORS)) + "|",
            *table,
            "",
        )
    )


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        table = rows([compile_instance(instance, folder) for instance in instances()], folder)
    if "--check" not in sys.argv:
        PAGE.write_text(page(table))
        return 0
    for row in missing(table):
        print(f"{PAGE.relative_to(CHECKOUT)} lacks {row}")
    return 1 if missing(table) else 0


if __name__ == "__main__":
    sys.exit(main())
