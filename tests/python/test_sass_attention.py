"""The attention kernels for GPUs as the CUDA compiler makes them: no spills, loops without waste.

Every instruction that the method needs per key tile is counted, so that a slow loop is seen where
there is no GPU. Compiles the bf16 instances for sm_80 and those for sm_75 (fp16) with the compiler
of the build; needs nvdisasm for machine code.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
from support import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

from sass import Code, find_tool, parse_sass  # noqa: E402
from sm80_registers import Compiled, Kernel, compile_instance, missing, rows, tile_shapes  # noqa: E402

HEAD_DIMS = (64, 96, 128, 192, 256)


class Tile(NamedTuple):
    """What a warp multiplies in one pass of the loop."""

    row_tiles: int  # of 16 rows
    keys: int


# Keys of a tile of the decode kernel.
DECODE_KEYS = {64: 64, 96: 32, 128: 32, 192: 16, 256: 16}

# FlashAttention-2's loops, built by the same compiler.
PEERS = json.loads((pathlib.Path(__file__).parent / "sm80_peers.json").read_text())

# What shows that a pass does it.
MODES = {"plain": "", "ALiBi": r"\|R", "softcap": r"MUFU\.RCP", "dropout": "-0x2daee0ad"}

# By the numbers of Extras.
EXTRAS_MODES = (("plain",), ("ALiBi", "softcap"), ("dropout",), ())

ADDRESSES_AND_MOVES = r"(IMAD|IADD3|LEA|LOP3|SHF|MOV|CS2R|S2R|R2UR|ULDC|U[A-Z0-9]+)$"

# More instructions than the peer's: by how many per mma. Dropout draws 16-bit numbers where
# FlashAttention-2 draws bytes, so head_dim 64, with most scores per mma, pays for a second draw.
OVER_PEER = {("64", "dropout"): 0.25, ("192", "plain"): 0.02}

# Where two 16-row tiles per warp fill the registers (at head_dim 128 the accumulators alone take
# 192 of 255), ptxas keeps a few row sums, addresses and bounds of the masked loop in local memory.
# Kernel, as on the page of registers -> bytes that it may store and load there, in all copies of
# the loop and around them.
SPILL_BUDGET = {
    "decode bf16 64 plain": 36,
    "decode bf16 128 plain paged": 28,
    "decode bf16 128 score_mod paged": 16,
    "forward bf16 64 plain paged": 148,
    "forward bf16 64 dropout": 12,
    "forward bf16 64 everything": 48,
    "forward bf16 64 everything paged": 228,
    "forward bf16 128 plain paged 164 KB": 124,
    "forward bf16 128 dropout 164 KB": 12,
    "forward bf16 192 plain paged 164 KB": 20,
    "forward bf16 256 plain paged 164 KB": 20,
}

# Local loads and stores in one pass of the mask-free loop, of some 900 instructions.
LOOP_BUDGET = {
    "forward bf16 64 dropout": 2,
    "forward bf16 64 everything": 4,
    "forward bf16 64 everything paged": 35,
    "forward bf16 64 plain paged": 22,
    "forward bf16 96 everything paged": 4,
    "forward bf16 128 dropout 164 KB": 2,
    "forward bf16 128 plain paged 164 KB": 12,
    "forward bf16 192 plain paged 164 KB": 2,
    "forward bf16 256 plain paged 164 KB": 2,
}


def tile_of(kernel: Kernel) -> Tile:
    """Of a warp."""
    if kernel.kind == "decode":
        return Tile(1, DECODE_KEYS[kernel.head_dim])
    rows, keys, warps = tile_shapes()[kernel.head_dim, kernel.shared_kb]
    return Tile(rows // warps // 16, keys)


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
@pytest.mark.parametrize("kind", ("forward", "decode"))
def test_the_loop_has_what_the_method_needs(sass, kind, head_dim):
    seen = 0
    for kernel, code in sass(head_dim).items():
        if kernel.kind != kind or kernel.extras:
            continue
        seen += 1
        need = needed(tile_of(kernel), kernel.head_dim, kernel.head_dim_v)
        found = code.hot_loop()
        found["FP32"] = found["FFMA"] + found["FMUL"] + found["FADD"]
        assert found["HMMA"] == need["HMMA"], kernel.label()
        for name, count in need.items():
            assert found[name] <= 1.15 * count, f"{kernel.label()}: {name}"
    assert seen


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_local_memory_in_the_loop(sass, head_dim):
    local = {}
    for kernel, code in sass(head_dim).items():
        if kernel.kind == "forward":
            found = code.hot_loop(MODES["dropout"] if kernel.extras == 2 else "")
            local[kernel.label()] = found["LDL"] + found["STL"]
    assert {k: n for k, n in local.items() if n > LOOP_BUDGET.get(k, 0)} == {}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_addresses_and_moves(sass, head_dim):
    """Integer arithmetic and moves of the plain loops: at most one to four products."""
    for kernel, code in sass(head_dim).items():
        if kernel.kind != "forward" or kernel.extras or kernel.paged:
            continue
        found = code.hot_loop()
        other = sum(n for name, n in found.items() if re.match(ADDRESSES_AND_MOVES, name))
        assert other <= 0.25 * found["HMMA"], f"{kernel.label()}: {other} of {found['HMMA']}"


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_no_more_instructions_than_flash_attention(sass, head_dim):
    compared = set()
    for kernel, code in sass(head_dim).items():
        if kernel.kind != "forward" or kernel.paged or kernel.head_dim_v != head_dim:
            continue
        name = f"{head_dim}, 164 KB" if kernel.shared_kb > 100 else str(head_dim)
        for mode in EXTRAS_MODES[kernel.extras]:
            peer = PEERS["instructions_per_mma"].get(name, {}).get(mode)
            if peer is None:
                continue
            found = code.hot_loop(MODES[mode])
            ours = sum(found.values()) / found["HMMA"]
            allowed = peer + OVER_PEER.get((name, mode), 0)
            assert round(ours, 2) <= allowed, f"{kernel.label()}, {mode}: {ours:.2f}, {peer}"
            compared.add((name, mode))
    wanted = [name for name in PEERS["instructions_per_mma"] if name.split(",")[0] == str(head_dim)]
    assert {name for name, _ in compared} == set(wanted)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_loop_has_no_mask(sass, head_dim):
    for kernel, code in sass(head_dim).items():
        if kernel.kind != "forward" or kernel.extras:
            continue
        tile = tile_of(kernel)
        assert code.hot_loop()["FSEL"] < tile.row_tiles * tile.keys // 16, kernel.label()


def test_the_page_of_registers_is_current(compiled, tmp_path):
    found: list[Compiled] = [compiled(head_dim) for head_dim in HEAD_DIMS]
    assert missing(rows(found, tmp_path)) == [], "run python scripts/sm80_registers.py"
