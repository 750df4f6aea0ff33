"""What the CUDA compiler makes of a kernel: registers, spills, machine code and its loops."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from typing import NamedTuple, Optional

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(CHECKOUT / "tools"))

import nvrtc  # noqa: E402


class Resources(NamedTuple):
    """What ptxas -v says of one kernel."""

    name: str  # mangled
    registers: int  # per thread
    spilled_bytes: int


class Instruction(NamedTuple):
    opcode: str  # with its modifiers
    label: Optional[str]  # of the branch target, if it has one
    operands: str = ""
    conditional: bool = False  # it has a predicate


@dataclasses.dataclass
class Code:
    """The machine code of one kernel."""

    instructions: list[Instruction] = dataclasses.field(default_factory=list)
    labels: dict[str, int] = dataclasses.field(default_factory=dict)  # instruction behind it

    def opcodes(self) -> list[str]:
        return [instruction.opcode for instruction in self.instructions]

    def successors(self, at: int) -> list[int]:
        """Where execution goes from an instruction."""
        instruction = self.instructions[at]
        name = instruction.opcode.partition(".")[0]
        following = [at + 1] if at + 1 < len(self.instructions) else []
        if name in ("EXIT", "RET"):
            return following if instruction.conditional else []
        target = self.labels.get(instruction.label or "")
        if name not in ("BRA", "JMP") or target is None or target >= len(self.instructions):
            return following
        if instruction.opcode == "BRA.DIV":  # taken by a warp whose lanes have come apart
            return following
        return [*following, target] if instruction.conditional else [target]

    def _body(self, header: int, end: int) -> set[int]:
        """The natural loop of a branch at `end` back to `header`."""
        before = collections.defaultdict(list)
        for at in range(len(self.instructions)):
            for follows in self.successors(at):
                before[follows].append(at)
        body, todo = {header, end}, [end] if end != header else []
        while todo:
            for at in before[todo.pop()]:
                if at not in body:
                    body.add(at)
                    todo.append(at)
        return body

    def _pass(self, header: int, body: set[int], wanted: str) -> tuple[int, list[int]]:
        """One pass through a loop: of the ways with most of what is always done (products, copies,
        barriers) and of what is wanted, the shortest. How many of these, and the instructions."""
        order: list[int] = []
        seen = {header}
        stack = [(header, iter(self.successors(header)))]
        while stack:
            at, rest = stack[-1]
            follows = next((n for n in rest if n in body and n not in seen), None)
            if follows is None:
                order.append(at)
                stack.pop()
            else:
                seen.add(follows)
                stack.append((follows, iter(self.successors(follows))))
        best: dict[int, tuple[int, int, Optional[int]]] = {}
        for at in order:  # what follows comes first
            ways = [(0, 0, None)] if header in self.successors(at) else []
            ways += [(*best[n][:2], n) for n in self.successors(at) if n in best and n != header]
            if not ways:
                continue
            done, length, follows = max(ways, key=lambda way: way[:2])
            instruction = self.instructions[at]
            text = f"{instruction.opcode} {instruction.operands}"
            done += 1000 * bool(re.match(r"HMMA|LDGSTS|BAR|LDGDEPBAR|DEPBAR", instruction.opcode))
            best[at] = (done + bool(wanted and re.search(wanted, text)), length - 1, follows)
        path, here = [], header if header in best else None
        while here is not None:
            path.append(here)
            here = best[here][2]
        return best[header][0] if path else 0, path

    def hot_loop(self, wanted: str = "") -> collections.Counter[str] | None:
        """A pass through the loop with most matrix products, by opcode without modifiers. Masks and
        other branches are left out, except those with instructions that match `wanted`."""
        passes: list[tuple[set[int], collections.Counter[str]]] = []
        for at in range(len(self.instructions)):
            for header in self.successors(at):
                if header > at:
                    continue
                body = self._body(header, at)
                _, path = self._pass(header, body, wanted)
                opcodes = (self.instructions[n].opcode.partition(".")[0] for n in path)
                count = collections.Counter(opcodes)
                if count["HMMA"]:
                    passes.append((body, count))
        # A loop around another has the products of a pass through that, and more.
        inner = [
            count
            for body, count in passes
            if not any(b < body and 2 * c["HMMA"] <= count["HMMA"] for b, c in passes)
        ]
        most = max((count["HMMA"] for count in inner), default=0)
        full = [count for count in inner if count["HMMA"] >= 0.9 * most]
        return min(full, key=lambda count: sum(count.values()), default=None)


def compile_cuda(
    source: str, folder: pathlib.Path, name: str, arch: str, options: Iterable[str] = ()
) -> tuple[pathlib.Path, str]:
    """Compiles CUDA as the build does, with the same compiler.

    Args:
        source: text; what it includes is looked for in the folders of ``-I`` options, then here.
        folder: where files named ``name`` are written.
        arch: ``sm_80`` for a cubin, ``compute_80`` for PTX.

    Returns:
        the output's path, and what the compiler said.

    Raises:
        nvrtc.NvrtcError: it does not compile, or there is no compiler for the architecture.
    """
    compiler = nvrtc.find(int(arch.partition("_")[2].rstrip("af")))
    if compiler is None:
        raise nvrtc.NvrtcError(f"no NVRTC for {arch}: python tools/nvrtc.py fetch FOLDER")
    path = folder / f"{name}.cu"
    path.write_text(source)
    compiled = compiler.compile(path, arch, [*options, f"-I{CHECKOUT}"])
    output = path.with_suffix(".cubin" if arch.startswith("sm_") else ".ptx")
    output.write_bytes(compiled.code)
    return output, compiled.log


def disassemble(cubin: pathlib.Path) -> dict[str, Code] | None:
    """Mangled kernel name -> its code; None where there is no nvdisasm (Python package
    nvidia-cuda-nvdisasm)."""
    nvdisasm = find_tool("nvdisasm")
    if nvdisasm is None:
        return None
    done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True)
    return parse_sass(done.stdout)


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on the path, of a toolkit, or of NVIDIA's Python packages."""
    folders = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    folders.append("/usr/local/cuda")
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or []) if spec else []:
        folders.append(os.path.join(location, "cu13"))
    paths = [os.path.join(folder, "bin", name) for folder in folders]
    return shutil.which(name) or next((p for p in paths if os.access(p, os.X_OK)), None)


def parse_ptxas(log: str) -> list[Resources]:
    """The kernels in the output of ptxas -v."""
    pattern = (
        r"entry function '(\S+)' for 'sm_\w+'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    return [
        Resources(name, int(registers), int(stored) + int(loaded))
        for name, stored, loaded, registers in re.findall(pattern, log, re.S)
    ]


def parse_sass(text: str) -> dict[str, Code]:
    """Mangled kernel name -> its code, from nvdisasm -c."""
    kernels: dict[str, Code] = {}
    code = Code()
    for line in text.splitlines():
        if section := re.match(r"\.text\.(\w+):", line):
            code = kernels.setdefault(section[1], Code())
        elif label := re.match(r"(\.L_x?_?\w+):", line):
            code.labels[label[1]] = len(code.instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@!?\w+ )?\s*([A-Z][\w.]*)([^;]*)", line):
            predicate, opcode, operands = found[1], found[2], found[3]
            target = re.search(r"`\((\.L\w+)\)", operands)
            conditional = predicate is not None or bool(
                opcode.startswith("BRA") and re.search(r"U?P\d", operands.partition("`")[0])
            )
            label = target[1] if target else None
            code.instructions.append(Instruction(opcode, label, operands.strip(), conditional))
    return kernels
