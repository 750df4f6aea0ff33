"""The sm_80 attention kernels as the CUDA compiler made them: no spills, loops without waste.

Every instruction that the method needs per key tile is counted, so that a slow loop is seen where
there is no GPU. Compiles the bf16 instances; needs nvcc, and nvdisasm for machine code.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import NamedTuple

import pytest
from support import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

from sass import Code, find_tool, parse_sass  # noqa: E402
from sm80_registers import Compiled, Kernel, compile_instance, missing, rows  # noqa: E402

HEAD_DIMS = (64, 96, 128, 192, 256)


class Tile(NamedTuple):
    """What a warp multiplies in one pass of the loop."""

    row_tiles: int  # of 16 rows
    keys: int


# Of the kernels without extras.
TILES = {
    "forward": {
        64: Tile(2, 96), 96: Tile(2, 64), 128: Tile(2, 64), 192: Tile(1, 64), 256: Tile(1, 64),
    },
    "decode": {
        64: Tile(1, 64), 96: Tile(1, 32), 128: Tile(1, 32), 192: Tile(1, 16), 256: Tile(1, 16),
    },
}  # fmt: skip


# Where two 16-row tiles per warp fill the registers (at head_dim 128 the accumulators alone take
# 192 of 255), ptxas keeps a few row sums, addresses and bounds of the masked loop in local memory.
# Kernel, as on the page of registers -> bytes that it may store and load there, in all copies of
# the loop and around them.
SPILL_BUDGET = {
    "forward bf16 64 plain": 68,
    "forward bf16 64 plain paged": 132,
    "forward bf16 64 everything paged": 24,
    "forward bf16 96 score_mod": 196,
    "forward bf16 128 plain": 276,
    "forward bf16 128 plain paged": 380,
    "forward bf16 128 score_mod": 168,
    "forward bf16 256 score_mod": 12,
    "forward bf16 256 everything": 28,
    "forward bf16 256 everything paged": 12,
}

# Local loads and stores in one pass of the mask-free loop, of some 900 instructions.
LOOP_BUDGET = {
    "forward bf16 64 plain paged": 4,
    "forward bf16 128 plain": 12,
    "forward bf16 128 plain paged": 20,
}


def needed(tile: Tile, head_dim: int, head_dim_v: int) -> dict[str, int]:
    """Instructions of a warp per pass: matrix products, ldmatrix.x4 for their operands,
    exponentials, fp32 arithmetic."""
    scores = tile.row_tiles * tile.keys // 2  # of one thread
    out = tile.row_tiles * head_dim_v // 2
    blocks = tile.keys // 16  # of 16 keys
    return {
        "HMMA": tile.row_tiles * blocks * (head_dim // 16 + head_dim_v // 16) * 2,
        "LDSM": (tile.row_tiles + blocks) * (head_dim // 16) + blocks * (head_dim_v // 16),
        "MUFU": scores + 2 * tile.row_tiles,  # and how much each row's maximum has grown
        "FP32": 2 * scores + out,  # scale and subtract, sum; shrink
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """head_dim -> Compiled, made when first asked for."""
    if find_tool("nvcc") is None:
        pytest.skip("no nvcc: the kernels cannot be compiled here")
    folder = tmp_path_factory.mktemp("sm80")
    return functools.cache(lambda head_dim: compile_instance(f"bf16_d{head_dim}", folder))


@pytest.fixture(scope="module")
def sass(compiled):
    """head_dim -> {Kernel: Code}."""
    nvdisasm = find_tool("nvdisasm")
    if nvdisasm is None:
        pytest.skip("no nvdisasm (Python package nvidia-cuda-nvdisasm)")

    @functools.cache
    def read(head_dim: int) -> dict[Kernel, Code]:
        command = [nvdisasm, "-c", str(compiled(head_dim).cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return {Kernel.from_mangled(name): code for name, code in parse_sass(done.stdout).items()}

    return read


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_no_warnings(compiled, head_dim):
    assert "warning" not in compiled(head_dim).log


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_spills(compiled, head_dim):
    spilled = {
        Kernel.from_mangled(entry.name).label(): entry.spilled_bytes
        for entry in compiled(head_dim).resources
    }
    assert {k: n for k, n in spilled.items() if n > SPILL_BUDGET.get(k, 0)} == {}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kind", TILES)
def test_the_loop_has_what_the_method_needs(sass, kind, head_dim):
    seen = 0
    for kernel, code in sass(head_dim).items():
        if kernel.kind != kind or kernel.extras:
            continue
        seen += 1
        need = needed(TILES[kind][head_dim], kernel.head_dim, kernel.head_dim_v)
        found = code.hot_loop()
        found["FP32"] = found["FFMA"] + found["FMUL"] + found["FADD"]
        assert found["HMMA"] == need["HMMA"], kernel.label()
        local = found["LDL"] + found["STL"]
        assert local <= LOOP_BUDGET.get(kernel.label(), 0), kernel.label()
        for name, count in need.items():
            assert found[name] <= 1.15 * count, f"{kernel.label()}: {name}"
    assert seen


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_loop_has_no_mask(sass, head_dim):
    for kernel, code in sass(head_dim).items():
        if kernel.kind != "forward" or kernel.extras:
            continue
        tile = TILES["forward"][head_dim]
        assert code.hot_loop()["FSEL"] < tile.row_tiles * tile.keys // 16, kernel.label()


def test_the_page_of_registers_is_current(compiled, tmp_path):
    found: list[Compiled] = [compiled(head_dim) for head_dim in HEAD_DIMS]
    assert missing(rows(found, tmp_path)) == [], "run python scripts/sm80_registers.py"
