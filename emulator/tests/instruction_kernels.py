"""Writes a PTX module with a kernel for every line of instruction_cases.def: case_0, case_1, ...

Lane 0 stores its result, so that the whole warp can run.

python instruction_kernels.py instruction_cases.def instruction_kernels.ptx
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HEADER = """.version 8.0
.target sm_90a
.address_size 64
"""


def kernel(index: int, code: str, types: list[str]) -> str:
    """Parameters: where the result goes, then the operands, 64 bits each."""
    operands = dict(zip("abce", types[1:]))
    params = "".join(f", .param .u64 case_{index}_{name}" for name in operands)
    lines = [
        f".visible .entry case_{index}(.param .u64 case_{index}_out{params})",
        "{",
        f".reg .{types[0]} d;",
        ".reg .b64 %out;",
        ".reg .b32 %word;",
        ".reg .pred %first;",
        f"ld.param.u64 %out, [case_{index}_out];",
    ]
    for name, kind in operands.items():
        lines.append(f".reg .{kind} {name};")
        if kind == "pred":
            lines.append(f"ld.param.u32 %word, [case_{index}_{name}];")
            lines.append(f"setp.ne.u32 {name}, %word, 0;")
        else:
            lines.append(f"ld.param.{kind} {name}, [case_{index}_{name}];")
    lines.append(code)
    lines += ["mov.u32 %word, %laneid;", "setp.eq.u32 %first, %word, 0;"]
    if types[0] == "pred":
        lines += ["selp.b32 %word, 1, 0, d;", "@%first st.global.b32 [%out], %word;"]
    else:
        lines.append(f"@%first st.global.{types[0]} [%out], d;")
    return "\n".join([*lines, "ret;", "}"])


def main() -> None:
    source, target = (Path(name) for name in sys.argv[1:])
    cases = re.findall(r'^CASE\("([^"]*)", "([^"]*)"', source.read_text(), re.M)
    kernels = [kernel(i, code, types.split()) for i, (code, types) in enumerate(cases)]
    target.write_text("\n".join([HEADER, *kernels]))


main()
