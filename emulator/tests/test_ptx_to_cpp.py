"""The translator of PTX (emulator/ptx_to_cpp): what it refuses, and source lines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ptx_to_cpp.emit import translate  # noqa: E402
from ptx_to_cpp.parse import REPOSITORY, TranslationError, parse  # noqa: E402

HEAD = f"""
.version 8.0
.target sm_80
.address_size 64
.file 1 "{REPOSITORY}/kernels/sm80/forward.cuh"
.file 2 "{REPOSITORY}/kernels/common/ptx.cuh"
.file 3 "/opt/cuda/include/cuda_fp16.hpp"
"""


def kernel(body: str) -> str:
    start = ".visible .entry k(.param .u64 p)\n{\n.reg .b32 %r<9>;\n.reg .pred %p<3>;"
    return translate(parse(f"{HEAD}\n{start}\n{body}\nret;\n}}\n"), "k.ptx")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("frobnicate.b32 %r1, %r2;", "unknown instruction: frobnicate.b32 %r1, %r2"),
        ("add.wild.s32 %r1, %r2, %r3;", "unknown modifier .wild"),
        ("add.s128 %r1, %r2, %r3;", "type .s128"),
        ("add.s32 %r1, %r2;", "2 operands"),
        ("add.s32 %r1, %r2, %q3;", "operand %q3"),
        ("mov.u32 %r99, 1;", "result %r99"),
        ("bra nowhere;", "label nowhere"),
        (
            "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 a, b, c, d;",
            "expected one of .m16n8k16",
        ),
        ("mov.u32 %r1, %smid;", "operand %smid"),
        ("ld.global.v4.u32 {%r1, %r2}, [%r3];", "2 registers"),
        ("shfl.up.b32 %r1, %r2, %r3, %r4, %r5;", "expected one of .sync"),
        ("call.uni (r), absent, (a);", "call of absent"),
        ("cp.async.cg.shared.global [%r1], [%r2], 8;", "cp.async of 8 bytes"),
    ],
)
def test_refusal_names_the_place(code: str, message: str) -> None:
    with pytest.raises(TranslationError) as refusal:
        kernel(f".loc 1 77 3\n{code}")
    assert message in str(refusal.value)
    assert str(refusal.value).startswith("k.ptx:14: ")
    assert "kernels/sm80/forward.cuh:77" in str(refusal.value)


def test_lines_are_those_of_the_kernel() -> None:
    """An instruction of a wrapper or of a toolkit header counts for the line that called it."""
    code = kernel(
        """
.loc 1 10 3
mov.u32 %r1, 1;
.loc 1 20 3, function_name $f, inlined_at 1 10 3
mov.u32 %r1, 2;
.loc 2 30 3, function_name $f, inlined_at 1 20 3
mov.u32 %r1, 3;
.loc 3 40 3, function_name $f, inlined_at 2 30 3
mov.u32 %r1, 4;
.loc 3 0 3
mov.u32 %r1, 5;
"""
    )
    lines = [line for line in code.splitlines() if "forward.cuh" in line or "r1 = " in line]
    assert lines == [
        '#line 10 "kernels/sm80/forward.cuh"',
        "r1 = uint32_t(1);",
        '#line 20 "kernels/sm80/forward.cuh"',
        "r1 = uint32_t(2); r1 = uint32_t(3); r1 = uint32_t(4); r1 = uint32_t(5); return;",
    ]


def test_scopes_of_inline_assembly() -> None:
    """Two blocks with the same register and label names do not meet."""
    block = "{\n.reg .pred p;\nAGAIN: setp.eq.u32 p, %r1, 0;\n@p bra AGAIN;\n}\n"
    code = kernel(block + block)
    assert "goto AGAIN_s1" in code and "goto AGAIN_s2" in code
    assert "bool p_s1;" in code and "bool p_s2;" in code
