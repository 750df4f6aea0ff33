"""Writes docs/kernels/gpu_registers.md: registers and shared memory of the attention kernels.

    python scripts/gpu_registers.py           # write
    python scripts/gpu_registers.py --check   # exit 1 if the page is not current

Compiles the instances of kernels/instances.def, those for sm_75 and those for sm_80.
"""

from __future__ import annotations

import pathlib
import re
import sys
import tempfile
from typing import NamedTuple

from sass import CHECKOUT, Resources, compile_cuda, parse_ptxas

PAGE = CHECKOUT / "docs/kernels/gpu_registers.md"

# Numbers among the template arguments of a kernel.
ARGUMENTS = {
    "forward": ("head_dim", "head_dim_v", "extras", "paged", "shared_kb"),
    "decode": ("head_dim", "head_dim_v", "extras", "paged"),
    "combine": (),
    "prepare": ("head_dim", "head_dim_v"),
    "far_rows": (),
    "sinks": (),
    "keys": ("head_dim", "head_dim_v", "extras", "shared_kb"),
    "queries": ("head_dim", "head_dim_v", "extras", "shared_kb"),
    "finish": ("head_dim", "shared_kb"),
}

# The class that has a kernel's numbers of threads and bytes, and its template arguments.
_TILE = "{dtype}, {head_dim}, {head_dim_v}, Extras({extras})"
CLASSES = {
    "forward": f"ForwardTile<{_TILE}, {{paged}}, {{shared_kb}}>",
    "decode": f"DecodeTile<{_TILE}, {{paged}}>",
    "keys": f"KeyTile<{_TILE}, {{shared_kb}}>",
    "queries": f"QueryTile<{_TILE}, {{shared_kb}}>",
    "finish": "QuerySums<{head_dim}, {shared_kb}>",
}
# Threads and bytes of the others.
SIZES = {"combine": (128, 0), "prepare": (256, 0), "far_rows": (256, 0), "sinks": (32, 0)}

EXTRAS = ("plain", "score_mod", "dropout", "everything")  # by the numbers of Extras


class Multiprocessor(NamedTuple):
    """What is shared out among blocks."""

    name: str
    shared: int  # bytes
    reserved: int  # bytes of them that go with each block
    threads: int
    blocks: int


# By the architecture of a family: on which its kernels are looked at.
MULTIPROCESSORS = {
    75: (Multiprocessor("T4", 64 << 10, 0, 1024, 16),),
    80: (
        Multiprocessor("A100", 164 << 10, 1024, 2048, 32),
        Multiprocessor("RTX 30, RTX 40", 100 << 10, 1024, 1536, 16),
    ),
}
REGISTERS = 65536


class Kernel(NamedTuple):
    """One kernel of an instance, in the words of the page."""

    dtype: str
    kind: str  # a key of ARGUMENTS
    head_dim: int = 0  # 0: of any
    head_dim_v: int = 0
    extras: int = 0
    paged: int = 0
    shared_kb: int = 0  # of the multiprocessors that it is for; 0: of any

    @classmethod
    def from_mangled(cls, name: str) -> Kernel:
        kind, dtype, arguments = re.search(r"([a-z_]+)_kernelINS_4(\w{4})E(\w*?)EEv", name).groups()
        found = re.findall(r"(?:Li|ExtrasE|Lb)(\d+)E", arguments + "E")
        numbers = dict(zip(ARGUMENTS[kind], map(int, found)))
        numbers.setdefault("head_dim_v", numbers.get("head_dim", 0))
        return cls(dtype, kind, **numbers)

    def label(self) -> str:
        """The first cell of its row."""
        size = f" {self.head_dim}" if self.head_dim else ""
        if self.head_dim_v != self.head_dim:
            size += f"/{self.head_dim_v}"
        extras = f" {EXTRAS[self.extras]}" if "extras" in ARGUMENTS[self.kind] else ""
        large = f" {self.shared_kb} KB" if self.shared_kb > 100 else ""
        return f"{self.kind} {self.dtype}{size}{extras}{' paged' if self.paged else ''}{large}"

    def constants(self) -> str:
        """The C++ class that has its numbers."""
        return CLASSES[self.kind].format(**self._asdict())


class Instance(NamedTuple):
    """A line of instances.def."""

    sm: int  # of its family
    direction: str
    dtype: str
    head_dim: int
    line: str

    def name(self) -> str:
        direction = "" if self.direction == "forward" else f"{self.direction}_"
        return f"{direction}{self.dtype}_d{self.head_dim}_{self.arch()}"

    def arch(self) -> str:
        """Its name in instances.def."""
        return f"sm{self.sm}"


class Compiled(NamedTuple):
    """An instance compiled for the architecture of its family."""

    instance: Instance
    resources: list[Resources]
    cubin: pathlib.Path
    log: str


def instances() -> dict[str, Instance]:
    """By name: bf16_d64_sm80, backward_bf16_d64_sm80."""
    text = (CHECKOUT / "kernels/instances.def").read_text()
    pattern = r"^(ATTENTION\(sm(\d+), (\w+), (\w+), (\d+),.*)$"
    all_of_them = [
        Instance(int(sm), direction, dtype, int(size), line)
        for line, sm, direction, dtype, size in re.findall(pattern, text, re.MULTILINE)
    ]
    return {instance.name(): instance for instance in all_of_them}


def tile_shapes() -> dict[tuple[int, int], tuple[int, int, int]]:
    """(head_dim, shared_kb) -> rows, keys, warps: the lines of tiles.def."""
    text = (CHECKOUT / "kernels/sm80/tiles.def").read_text()
    lines = re.findall(r"^TILE\((\d+), (\d+), (\d+), (\d+), (\d+)\)", text, re.MULTILINE)
    numbers = [tuple(map(int, line)) for line in lines]
    return {(line[0], line[1]): line[2:] for line in numbers}


def compile_instance(name: str, folder: pathlib.Path) -> Compiled:
    """One line of instances.def as kernels/CMakeLists.txt compiles it.

    Raises:
        nvrtc.NvrtcError: it does not compile, or there is no compiler.
    """
    instance = instances()[name]
    source = (CHECKOUT / "kernels/instance.cu.in").read_text()
    source = source.replace(
        "@HEADER@", f"kernels/{instance.arch()}/attention_{instance.direction}.cuh"
    )
    source = source.replace("@INSTANCE@", instance.line)
    options = ("--ptxas-options=-v",)
    cubin, log = compile_cuda(source, folder, name, f"sm_{instance.sm}", options)
    return Compiled(instance, parse_ptxas(log), cubin, log)


def tile_sizes(kernels: list[Kernel], folder: pathlib.Path) -> dict[Kernel, tuple[int, int]]:
    """(threads, bytes of shared memory) by kernel: constants of their classes, read from PTX."""
    tiled = [kernel for kernel in kernels if kernel.kind in CLASSES]
    lines = [
        f"__device__ int {word}_{number} = {kernel.constants()}::k{word};"
        for number, kernel in enumerate(tiled)
        for word in ("Threads", "SharedBytes")
    ]
    body = "\n".join(lines)
    source = (
        f'#include "kernels/sm80/attention_backward.cuh"\nnamespace anyflash::sm80 {{\n{body}\n}}\n'
    )
    ptx, _ = compile_cuda(source, folder, "sizes", "compute_80")
    pattern = r"((?:Threads|SharedBytes)_\d+)E? = (\d+)"
    found = {name: int(value) for name, value in re.findall(pattern, ptx.read_text())}
    sizes = {
        kernel: (found[f"Threads_{number}"], found[f"SharedBytes_{number}"])
        for number, kernel in enumerate(tiled)
    }
    return {kernel: sizes.get(kernel) or SIZES[kernel.kind] for kernel in kernels}


def blocks(registers: int, threads: int, shared: int, on: Multiprocessor) -> int:
    """Blocks that a multiprocessor holds at a time."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    return min(
        by_registers, on.shared // (shared + on.reserved or 1), on.threads // threads, on.blocks
    )


def rows(compiled: list[Compiled], folder: pathlib.Path) -> list[str]:
    """The table's rows of these instances, which are of one family."""
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
            for multiprocessor in MULTIPROCESSORS[compiled[0].instance.sm]
        ]
        cells = (entry.registers, entry.spilled_bytes, threads, shared, *held)
        lines.append(f"| {kernel.label()} | {' | '.join(map(str, cells))} |")
    return lines


def missing(there: list[str]) -> list[str]:
    """Rows that the page does not have."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    return [row for row in there if row not in lines]


def table(sm: int, lines: list[str]) -> list[str]:
    held = [f"blocks, {multiprocessor.name}" for multiprocessor in MULTIPROCESSORS[sm]]
    head = ["kernel", "registers", "spilled bytes", "threads", "shared memory", *held]
    return [f"## sm_{sm}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines, ""]


def page(tables: list[str]) -> str:
    return "\n".join(
        (
            "# Registers and shared memory of the attention kernels for GPUs",
            "",
            "Written by `python scripts/gpu_registers.py`, compiled as the build does for the",
            "first GPUs of each family. Names are kind, dtype, head_dim and extras",
            "(`kernels/common/scores.cuh`); blocks are what a multiprocessor holds at a time.",
            "Of the backward are `prepare`, `far_rows`, `sinks`, `keys`, `queries` and `finish`.",
            "",
            *tables,
        )
    )


def main() -> int:
    written: list[str] = []
    lacking: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for sm in MULTIPROCESSORS:
            of_family = [name for name, instance in instances().items() if instance.sm == sm]
            lines = rows([compile_instance(name, folder) for name in of_family], folder)
            written += table(sm, lines)
            lacking += missing(lines)
    if "--check" not in sys.argv:
        PAGE.write_text(page(written))
        return 0
    for row in lacking:
        print(f"{PAGE.relative_to(CHECKOUT)} lacks {row}")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
