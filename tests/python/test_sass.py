"""What the CUDA compiler made of the kernels: registers, spills, and the width of memory accesses.

Compiles every kernel family for each architecture, with the compiler of the build; needs nvdisasm
for the tests that read machine code.
"""

from __future__ import annotations

import functools
import pathlib
import re
import sys

import pytest
from support import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))
sys.path.append(str(REPOSITORY / "tools"))

from sass import (  # noqa: E402
    Code,
    Instruction,
    Resources,
    compile_cuda,
    disassemble,
    parse_ptxas,
    parse_sass,
)

import nvrtc  # noqa: E402

ARCHS = ("75", "80", "90")
DTYPES = ("fp16", "bf16", "fp32")

# Kernel -> most registers per thread. A multiprocessor holds 65536 / (256 threads * registers)
# blocks.
REGISTER_BUDGET = {
    "forward": 64,
    "backward": 64,
    "gated forward": 64,
    "gated backward": 128,
    "sum": 64,
}

SOURCE = """
#include "kernels/elementwise/bias_activation.cuh"
namespace anyflash::bias_activation {{
{}
}}
""".format(
    "\n".join(
        f"template int32_t launch_{direction}<{dtype}>(const BiasActivationParams&, void*);"
        for direction in ("forward", "backward")
        for dtype in DTYPES
    )
)


def kind_of(name: str) -> str:
    """Which row of REGISTER_BUDGET a mangled kernel name belongs to."""
    if "sum_partials" in name:
        return "sum"
    direction = "backward" if "backward_kernel" in name else "forward"
    return f"gated {direction}" if "ActivationE4" in name else direction


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory):
    """arch -> (kernels, path of the cubin), compiled when first asked for."""
    if nvrtc.find(75) is None:
        pytest.skip("no NVRTC: the kernels cannot be compiled here")
    folder = tmp_path_factory.mktemp("sass")

    @functools.cache
    def compile_for(arch: str) -> tuple[list[Resources], pathlib.Path]:
        options = ("--ptxas-options=-v",)
        cubin, log = compile_cuda(SOURCE, folder, f"kernels_{arch}", f"sm_{arch}", options)
        assert "warning" not in log
        return parse_ptxas(log), cubin

    return compile_for


@pytest.fixture(scope="module")
def sass(compiled):
    """arch -> {kernel: opcodes}."""

    @functools.cache
    def read(arch: str) -> dict[str, list[str]]:
        found = disassemble(compiled(arch)[1])
        if found is None:
            pytest.skip("no nvdisasm (Python package nvidia-cuda-nvdisasm)")
        return {name: code.opcodes() for name, code in found.items()}

    return read


@pytest.mark.parametrize("arch", ARCHS)
def test_all_kernels_are_there(compiled, arch):
    kernels, _ = compiled(arch)
    # 3 dtypes x 5 activations x 2 directions x (vectorised or not), and one sum per dtype
    assert len(kernels) == 3 * 5 * 2 * 2 + 3
    assert {kind_of(kernel.name) for kernel in kernels} == set(REGISTER_BUDGET)


@pytest.mark.parametrize("arch", ARCHS)
def test_no_spills(compiled, arch):
    assert [kernel for kernel in compiled(arch)[0] if kernel.spilled_bytes] == []


@pytest.mark.parametrize("arch", ARCHS)
def test_register_budget(compiled, arch):
    over = [k for k in compiled(arch)[0] if k.registers > REGISTER_BUDGET[kind_of(k.name)]]
    assert over == []


@pytest.mark.parametrize("arch", ARCHS)
def test_no_local_memory(sass, arch):
    for name, instructions in sass(arch).items():
        assert [i for i in instructions if i.startswith(("LDL", "STL"))] == [], name


@pytest.mark.parametrize("arch", ARCHS)
def test_vectorised_kernels_use_16_byte_accesses(sass, compiled, arch):
    instructions = sass(arch)
    for kernel in compiled(arch)[0]:
        wide = [i for i in instructions[kernel.name] if re.match(r"(LDG|STG)\.E\.128", i)]
        loads = sum(i.startswith("LDG") for i in wide)
        stores = len(wide) - loads
        if "Lb1E" not in kernel.name:
            assert wide == [], kernel.name
            continue
        kind = kind_of(kernel.name)
        # per thread two rows of each operand, and the bias once
        operands = {"forward": 1, "gated forward": 2, "backward": 2, "gated backward": 3}
        results = {"forward": 1, "gated forward": 1, "backward": 1, "gated backward": 2}
        biases = 2 if kind.startswith("gated") else 1
        assert loads == 2 * operands[kind] + biases, kernel.name
        assert stores == 2 * results[kind], kernel.name


def test_ptxas_parser():
    log = (
        "ptxas info    : Compiling entry function '_Z14forward_kernelLb1E' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z14forward_kernelLb1E\n"
        "    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 0 barriers\n"
    )
    assert parse_ptxas(log) == [Resources("_Z14forward_kernelLb1E", 40, 12)]


def test_sass_parser():
    text = (
        ".text._Zk:\n"
        "        /*0000*/                   LDG.E.128 R4, [R2.64] ;\n"
        ".L_x_1:\n"
        "        /*0010*/              @!P0 STL [R1], R4 ;\n"
        ".L_x_2:\n"
        "        /*0020*/                   HMMA.16816.F32 R4, R8, R12, R4 ;\n"
        "        /*0030*/               @P1 BRA `(.L_x_2) ;\n"
        "        /*0040*/                   BRA `(.L_x_1) ;\n"
    )
    code = parse_sass(text)["_Zk"]
    assert code == Code(
        [
            Instruction("LDG.E.128", None, "R4, [R2.64]"),
            Instruction("STL", None, "[R1], R4", True),
            Instruction("HMMA.16816.F32", None, "R4, R8, R12, R4"),
            Instruction("BRA", ".L_x_2", "`(.L_x_2)", True),
            Instruction("BRA", ".L_x_1", "`(.L_x_1)"),
        ],
        {".L_x_1": 1, ".L_x_2": 2},
    )
    assert code.hot_loop() == {"HMMA": 1, "BRA": 1}


def test_a_pass_leaves_out_what_most_passes_do():
    text = (
        ".text._Zk:\n"
        ".L_x_1:\n"
        "        /*0000*/                   HMMA.16816.F32 R4, R8, R12, R4 ;\n"
        "        /*0010*/               @P0 BRA `(.L_x_2) ;\n"
        "        /*0020*/                   FSEL R4, R4, R5, P1 ;\n"
        "        /*0030*/                   FSEL R6, R6, R5, P1 ;\n"
        ".L_x_2:\n"
        "        /*0040*/               @P2 BRA `(.L_x_1) ;\n"
        "        /*0050*/                   EXIT ;\n"
    )
    code = parse_sass(text)["_Zk"]
    assert code.hot_loop() == {"HMMA": 1, "BRA": 2}
    assert code.hot_loop("FSEL") == {"HMMA": 1, "BRA": 2, "FSEL": 2}
