"""What the CUDA compiler made of a kernel: registers, spills, machine code and its loops."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import os
import re
import shutil
from typing import NamedTuple, Optional


class Resources(NamedTuple):
    """What ptxas -v says of one kernel."""

    name: str  # mangled
    registers: int  # per thread
    spilled_bytes: int


class Instruction(NamedTuple):
    opcode: str  # with its modifiers
    label: Optional[str]  # of the branch target, if it has one


@dataclasses.dataclass
class Code:
    """The machine code of one kernel."""

    instructions: list[Instruction] = dataclasses.field(default_factory=list)
    labels: dict[str, int] = dataclasses.field(default_factory=dict)  # instruction behind it

    def opcodes(self) -> list[str]:
        return [instruction.opcode for instruction in self.instructions]

    def loops(self) -> list[range]:
        """Instructions from the target of a backward branch to the branch, innermost first."""
        found = []
        for at, instruction in enumerate(self.instructions):
            begin = self.labels.get(instruction.label or "", at + 1)
            if instruction.opcode.startswith("BRA") and begin <= at:
                found.append(range(begin, at + 1))
        return sorted(found, key=len)

    def count(self, where: range) -> collections.Counter[str]:
        """Instructions of a loop by opcode without modifiers."""
        return collections.Counter(self.instructions[at].opcode.partition(".")[0] for at in where)

    def hot_loop(self) -> collections.Counter[str] | None:
        """The innermost loop with a matrix product; of several the shortest."""
        counts = (self.count(loop) for loop in self.loops())
        return next((count for count in counts if count["HMMA"]), None)


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
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?\s*([A-Z][\w.]*)(.*)", line):
            target = re.search(r"`\((\.L\w+)\)", found[2])
            code.instructions.append(Instruction(found[1], target[1] if target else None))
    return kernels
