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
import sys
from collections import Counter
from typing import NamedTuple

import pytest
from support import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))
sys.path.append(str(REPOSITORY / "tools"))

from gpu_registers import Kernel, compile_instance, instances, missing, rows, tile_shapes  # noqa: E402
from sass import Code, disassemble  # noqa: E402

import nvrtc  # noqa: E402

# For sm_80 bf16 stands for both dtypes.
INSTANCES = [name for name in instances() if not re.search(r"fp16_.*_sm80", name)]
FORWARD = [name for name in INSTANCES if instances()[name].direction == "forward"]
BACKWARD = [name for name in INSTANCES if instances()[name].direction == "backward"]
SM80 = [name for name in FORWARD if name.endswith("_sm80")]
BACKWARD_SM80 = [name for name in BACKWARD if name.endswith("_sm80")]
BACKWARD_SM75 = [name for name in BACKWARD if name.endswith("_sm75")]


class Tile(NamedTuple):
    """What a warp multiplies in one pass of the loop."""

    row_tiles: int  # of 16 rows
    keys: int


# Keys of a tile of the decode kernel.
DECODE_KEYS = {64: 64, 96: 32, 128: 32, 192: 16, 256: 16}

# FlashAttention-2's loops, built by the same compiler.
PEERS = json.loads((pathlib.Path(__file__).parent / "attention_peers.json").read_text())

# What shows that a pass does it.
MODES = {"plain": "", "ALiBi": r"\|R", "softcap": r"MUFU\.RCP", "dropout": "-0x2daee0ad"}

# By the numbers of Extras.
EXTRAS_MODES = (("plain",), ("ALiBi", "softcap"), ("dropout",), ())

ADDRESSES_AND_MOVES = r"(IMAD|IADD3|LEA|LOP3|SHF|MOV|CS2R|S2R|R2UR|ULDC|U[A-Z0-9]+)$"

# More instructions than the peer's: by how many per mma. Dropout draws 16-bit numbers where
# FlashAttention-2 draws bytes, so head_dim 64, with most scores per mma, pays for a second draw.
OVER_PEER = {("64", "dropout"): 0.25, ("192", "plain"): 0.01}

# Where two 16-row tiles per warp fill the registers (at head_dim 128 the accumulators alone take
# 192 of 255), ptxas keeps a few row sums, addresses and bounds of the masked loop in local memory.
# Kernel, as on the page of registers -> bytes that it may store and load there, in all copies of
# the loop and around them.
SPILL_BUDGET = {
    "decode bf16 64 plain": 36,
    "forward bf16 64 dropout": 12,
    "forward bf16 64 everything": 16,
    "forward bf16 64 everything paged": 104,
    "forward bf16 128 plain paged": 12,
    "forward bf16 128 dropout 164 KB": 28,
    "forward bf16 128 everything paged": 12,
    # the backward, all outside of its mask-free loops
    "keys bf16 64 plain 164 KB": 16,
    "keys bf16 64 score_mod 164 KB": 16,
    "keys bf16 64 dropout 164 KB": 16,
    "keys bf16 96 score_mod": 24,
    "keys bf16 96 everything": 400,
    "keys bf16 128 plain 164 KB": 96,
    "keys bf16 128 score_mod 164 KB": 8,
    "keys bf16 128 dropout 164 KB": 52,
    "keys bf16 256 plain": 8,
    "keys bf16 256 plain 164 KB": 68,
    "keys bf16 256 score_mod": 8,
    "keys bf16 256 score_mod 164 KB": 88,
    "keys bf16 256 dropout": 8,
    "keys bf16 256 dropout 164 KB": 88,
    "keys bf16 256 everything": 40,
    # sm_75
    "forward fp16 128 everything": 108,
    "forward fp16 128 everything paged": 20,
    "forward fp16 256 plain": 136,
    "forward fp16 256 score_mod": 244,
    "forward fp16 256 dropout": 228,
    "forward fp16 256 everything": 448,
    "forward fp16 256 everything paged": 380,
    "keys fp16 64 everything": 32,
    "keys fp16 128 score_mod": 108,
    "keys fp16 128 dropout": 120,
    "keys fp16 128 everything": 132,
    "queries fp16 64 everything": 400,
}

# Local loads and stores in one pass of the mask-free loop, of some 900 instructions.
LOOP_BUDGET = {
    "decode bf16 64 plain": 1,
    "forward bf16 64 dropout": 2,
    "forward bf16 64 everything": 4,
    "forward bf16 64 everything paged": 11,
    "forward bf16 128 plain paged": 1,
    "forward bf16 128 dropout 164 KB": 2,
    "keys bf16 64 dropout 164 KB": 2,
    "keys bf16 96 everything": 39,
    "keys bf16 256 score_mod 164 KB": 3,
    "keys bf16 256 dropout 164 KB": 1,
    "forward bf16 128 everything paged": 1,
    # sm_75
    "forward fp16 128 everything": 2,
    "forward fp16 128 everything paged": 1,
    "forward fp16 256 plain": 11,
    "forward fp16 256 score_mod": 15,
    "forward fp16 256 dropout": 10,
    "forward fp16 256 everything": 19,
    "forward fp16 256 everything paged": 23,
    "keys fp16 128 everything": 3,
    "queries fp16 64 everything": 30,
}

# Loops that read pages: instructions, as a multiple of those of the same kernel without pages.
PAGED = {"forward": 1.07, "decode": 1.17}

# What the backward's loops are to take per mma at most, where that is less than the peer's count.
BACKWARD_GOALS = {
    "64, 164 KB": 3.1,
    "64, 100 KB": 3.3,
    "96, 100 KB": 2.65,
    "128, 164 KB": 2.5,
    "128, 100 KB": 2.75,
    "192, 164 KB": 2.55,
    "192, 100 KB": 2.75,
    "256, 164 KB": 2.35,
    "256, 100 KB": 2.85,
}

# Integer arithmetic and moves per mma of the backward's: where a step has few mma, its addresses
# weigh more.
BACKWARD_ADDRESSES = {"64, 100 KB": 0.3, "192, 100 KB": 0.3}

# What the loops of sm_75's backward take per 16x8x16 product at most, of which two are mma; and
# their integer arithmetic and moves.
BACKWARD_GOALS_SM75 = {
    "keys fp16 64 plain": (4.9, 0.3),
    "keys fp16 128 plain": (4.1, 0.35),
    "queries fp16 64 plain": (4.7, 0.3),
    "queries fp16 128 plain": (4.0, 0.3),
}

# Integer arithmetic and moves per product of the plain loops: one to four. On sm_75, where two
# numbers are packed by two conversions and tiles pass through registers, more.
ADDRESSES_PER_PRODUCT = {"fp16_d64_sm75": 0.43, "fp16_d128_sm75": 0.3, "fp16_d256_sm75": 1.02}


def tile_of(kernel: Kernel) -> Tile:
    """Of a warp."""
    if kernel.kind == "decode":
        return Tile(1, DECODE_KEYS[kernel.head_dim])
    rows, keys, warps = tile_shapes()[kernel.head_dim, kernel.shared_kb]
    return Tile(rows // warps // 16, keys)


def products(name: str) -> int:
    """Instructions of an instance for a 16x8x16 product."""
    return 1 if name.endswith("_sm80") else 2


def addresses_and_moves(loop: Counter[str]) -> int:
    return sum(n for name, n in loop.items() if re.match(ADDRESSES_AND_MOVES, name))


def needed(tile: Tile, head_dim: int, head_dim_v: int, products: int) -> dict[str, int]:
    """Instructions of a warp per pass: matrix products, ldmatrix.x4 for their operands,
    exponentials, fp32 arithmetic."""
    scores = tile.row_tiles * tile.keys // 2  # of one thread
    out = tile.row_tiles * head_dim_v // 2
    blocks = tile.keys // 16  # of 16 keys
    return {
        "HMMA": products * tile.row_tiles * blocks * (head_dim // 16 + head_dim_v // 16) * 2,
        "LDSM": (tile.row_tiles + blocks) * (head_dim // 16) + blocks * (head_dim_v // 16),
        "MUFU": scores + 2 * tile.row_tiles,  # and how much each row's maximum has grown
        "FP32": 2 * scores + out,  # scale and subtract, sum; shrink
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Name of an instance -> Compiled, made when first asked for."""
    if nvrtc.find(80) is None:
        pytest.skip("no NVRTC: the kernels cannot be compiled here")
    folder = tmp_path_factory.mktemp("attention")
    return functools.cache(lambda name: compile_instance(name, folder))


@pytest.fixture(scope="module")
def sass(compiled):
    """Name of an instance -> {Kernel: Code}."""

    @functools.cache
    def read(name: str) -> dict[Kernel, Code]:
        found = disassemble(compiled(name).cubin)
        if found is None:
            pytest.skip("no nvdisasm (Python package nvidia-cuda-nvdisasm)")
        return {Kernel.from_mangled(name): code for name, code in found.items()}

    return read


@pytest.mark.parametrize("name", INSTANCES)
def test_no_warnings(compiled, name):
    assert "warning" not in compiled(name).log


@pytest.mark.parametrize("name", INSTANCES)
def test_spills(compiled, name):
    spilled = {
        Kernel.from_mangled(entry.name).label(): entry.spilled_bytes
        for entry in compiled(name).resources
    }
    assert {k: n for k, n in spilled.items() if n > SPILL_BUDGET.get(k, 0)} == {}


@pytest.mark.parametrize("name", FORWARD)
def test_the_loop_has_what_the_method_needs(sass, name):
    seen = set()
    for kernel, code in sass(name).items():
        if kernel.kind == "combine" or kernel.extras:
            continue
        seen.add(kernel.kind)
        need = needed(tile_of(kernel), kernel.head_dim, kernel.head_dim_v, products(name))
        found = code.hot_loop()
        found["FP32"] = found["FFMA"] + found["FMUL"] + found["FADD"]
        assert found["HMMA"] == need["HMMA"], kernel.label()
        for opcode, count in need.items():
            assert found[opcode] <= 1.15 * count, f"{kernel.label()}: {opcode}"
    assert seen == ({"forward", "decode"} if name in SM80 else {"forward"})


@pytest.mark.parametrize("name", FORWARD)
def test_local_memory_in_the_loop(sass, name):
    local = {}
    for kernel, code in sass(name).items():
        if kernel.kind in ("forward", "decode"):
            found = code.hot_loop(MODES["dropout"] if kernel.extras == 2 else "")
            local[kernel.label()] = found["LDL"] + found["STL"]
    assert {k: n for k, n in local.items() if n > LOOP_BUDGET.get(k, 0)} == {}


@pytest.mark.parametrize("name", FORWARD)
def test_addresses_and_moves(sass, name):
    for kernel, code in sass(name).items():
        if kernel.kind != "forward" or kernel.extras or kernel.paged:
            continue
        found = code.hot_loop()
        other = addresses_and_moves(found)
        count = found["HMMA"] // products(name)
        assert other <= ADDRESSES_PER_PRODUCT.get(name, 0.25) * count, (
            f"{kernel.label()}: {other} of {count}"
        )


@pytest.mark.parametrize("name", SM80)
def test_pages_cost_little(sass, name):
    loops = {kernel: code.hot_loop() for kernel, code in sass(name).items() if not kernel.extras}
    paged = [kernel for kernel in loops if kernel.paged]
    assert paged
    for kernel in paged:
        ours, without = (sum(loops[k].values()) for k in (kernel, kernel._replace(paged=False)))
        assert ours <= PAGED[kernel.kind] * without, f"{kernel.label()}: {ours}, {without}"
        # A thread looks up one row for keys and values; of 64 keys that a warp loads alone, two.
        entries = 2 if (kernel.kind, kernel.head_dim) == ("decode", 64) else 1
        assert loops[kernel]["LDG"] == entries, f"{kernel.label()}: entries of the block table"


@pytest.mark.parametrize("name", SM80)
def test_no_more_instructions_than_flash_attention(sass, name):
    head_dim = instances()[name].head_dim
    compared = set()
    for kernel, code in sass(name).items():
        if kernel.kind != "forward" or kernel.paged or kernel.head_dim_v != head_dim:
            continue
        line = f"{head_dim}, 164 KB" if kernel.shared_kb > 100 else str(head_dim)
        for mode in EXTRAS_MODES[kernel.extras]:
            peer = PEERS["instructions_per_mma"].get(line, {}).get(mode)
            if peer is None:
                continue
            found = code.hot_loop(MODES[mode])
            ours = sum(found.values()) / found["HMMA"]
            allowed = peer + OVER_PEER.get((line, mode), 0)
            assert round(ours, 2) <= allowed, f"{kernel.label()}, {mode}: {ours:.2f}, {peer}"
            compared.add((line, mode))
    wanted = [line for line in PEERS["instructions_per_mma"] if line.split(",")[0] == str(head_dim)]
    assert {line for line, _ in compared} == set(wanted)


def test_half_of_the_instructions_of_memory_efficient_attention(sass):
    """On sm_75, where PyTorch has no other."""
    for head_dim, peer in PEERS["instructions_per_product_sm75"].items():
        name = f"fp16_d{head_dim}_sm75"
        (plain,) = (c for k, c in sass(name).items() if (k.kind, k.extras) == ("forward", 0))
        found = plain.hot_loop()
        ours = sum(found.values()) / (found["HMMA"] / products(name))
        assert ours <= peer["plain"] / 2, f"{name}: {ours:.2f}, {peer['plain']}"


@pytest.mark.parametrize("name", FORWARD)
def test_the_loop_has_no_mask(sass, name):
    for kernel, code in sass(name).items():
        if kernel.kind != "forward" or kernel.extras:
            continue
        tile = tile_of(kernel)
        assert code.hot_loop()["FSEL"] < tile.row_tiles * tile.keys // 16, kernel.label()


class KeyTile(NamedTuple):
    """A line of backward_tiles.def."""

    rows: int
    keys: int
    score_warps: int
    key_warps: int
    query_warps: int
    q_buffers: int
    v_in_registers: int

    def needed(self, head_dim: int, head_dim_v: int, products: int) -> dict[str, int]:
        """Instructions of one of 8 warps per query tile: matrix products, ldmatrix.x4 for their
        operands, exponentials, additions to dq; sm_75, with two instructions for a product, has
        none of these."""
        rows, keys = self.rows // self.score_warps, self.keys // (8 // self.score_warps)
        own_keys, columns = self.keys // self.key_warps, 8 // self.key_warps
        own_rows, query_columns = self.rows // self.query_warps, 8 // self.query_warps
        both = head_dim + head_dim_v
        scores = (rows + keys) * head_dim + (rows + keys * (1 - self.v_in_registers)) * head_dim_v
        sums = self.rows * (2 * own_keys + both // columns)
        adds = products == 1
        dq = adds * self.keys * (own_rows + head_dim // query_columns)
        depth = 2 * both + adds * head_dim
        return {
            "HMMA": products * self.rows * self.keys * depth // 8 // (16 * 8 * 16),
            "LDSM": (scores + sums + dq) // 256,
            "MUFU": rows * keys // 32,
            "RED": adds * self.rows * head_dim // 256,
        }


class QueryTile(NamedTuple):
    """The same of the kernel that computes dq alone."""

    rows: int
    keys: int
    warps: int
    q_in_registers: int

    def needed(self, head_dim: int, head_dim_v: int, products: int) -> dict[str, int]:
        """Instructions of a warp per key tile."""
        rows, keys = self.rows // self.warps, self.keys
        q, dout = rows * head_dim * (1 - self.q_in_registers), rows * head_dim_v
        return {
            "HMMA": products * rows * keys * (2 * head_dim + head_dim_v) // (16 * 8 * 16),
            "LDSM": (q + dout + keys * (2 * head_dim + head_dim_v)) // 256,
            "MUFU": rows * keys // 32,
        }


def backward_tile(kernel: Kernel) -> KeyTile | QueryTile:
    """The line of a kernel that has one."""
    macro, tile = {"keys": ("KEY_TILE", KeyTile), "queries": ("QUERY_TILE", QueryTile)}[kernel.kind]
    text = (REPOSITORY / "kernels/sm80/backward_tiles.def").read_text()
    place = rf"{kernel.head_dim}, {kernel.shared_kb}"
    (numbers,) = re.findall(rf"^{macro}\({place}, (.*)\)", text, re.MULTILINE)
    return tile(*map(int, numbers.split(",")))


def plain_loops(sass, name: str, *kinds: str) -> dict[Kernel, Counter[str]]:
    """The mask-free loops of kernels without extras, with their copies."""
    return {
        kernel: code.hot_loop(r"LDG\.E\.128")
        for kernel, code in sass(name).items()
        if kernel.kind in kinds and not kernel.extras
    }


@pytest.mark.parametrize("name", BACKWARD)
def test_the_backward_has_what_the_method_needs(sass, name):
    for kernel, found in plain_loops(sass, name, "keys", "queries").items():
        tile = backward_tile(kernel)
        needed = tile.needed(kernel.head_dim, kernel.head_dim_v, products(name))
        for opcode, count in needed.items():
            assert found[opcode] == count, f"{kernel.label()}: {opcode}"
        barriers = 2 if kernel.kind == "queries" else 3
        if kernel.kind == "keys" and name in BACKWARD_SM80 and tile.q_buffers == 1:
            barriers = 4
        assert found["BAR"] == barriers, kernel.label()
        assert found["FSEL"] == 0, f"{kernel.label()} has a mask in its loop"


@pytest.mark.parametrize("name", BACKWARD)
def test_local_memory_in_the_backward_loop(sass, name):
    local = {}
    for kernel, code in sass(name).items():
        if kernel.kind in ("keys", "queries"):
            found = code.hot_loop(MODES["dropout"] if kernel.extras == 2 else "")
            local[kernel.label()] = found["LDL"] + found["STL"]
    assert {k: n for k, n in local.items() if n > LOOP_BUDGET.get(k, 0)} == {}


@pytest.mark.parametrize("name", BACKWARD_SM80)
def test_the_backward_has_no_more_instructions_than_flash_attention(sass, name):
    compared = set()
    for kernel, found in plain_loops(sass, name, "keys").items():
        if kernel.head_dim_v != kernel.head_dim:
            continue
        line = f"{kernel.head_dim}, {kernel.shared_kb} KB"
        peers = PEERS["backward_instructions_per_mma"][line]
        ours = sum(found.values()) / found["HMMA"]
        assert ours <= BACKWARD_GOALS.get(line, min(peers.values())), (
            f"{kernel.label()}: {ours:.2f}"
        )
        allowed = BACKWARD_ADDRESSES.get(line, 0.25) * found["HMMA"]
        assert addresses_and_moves(found) <= allowed, kernel.label()
        compared.add(line)
    head_dim = str(instances()[name].head_dim)
    peers = PEERS["backward_instructions_per_mma"]
    assert compared == {line for line in peers if line.split(",")[0] == head_dim}


@pytest.mark.parametrize("name", BACKWARD_SM75)
def test_instructions_of_the_backward_on_sm75(sass, name):
    for kernel, found in plain_loops(sass, name, "keys", "queries").items():
        count = found["HMMA"] / products(name)
        most, most_addresses = BACKWARD_GOALS_SM75[kernel.label()]
        ours, addresses = sum(found.values()) / count, addresses_and_moves(found) / count
        assert ours <= most, f"{kernel.label()}: {ours:.2f}"
        assert addresses <= most_addresses, f"{kernel.label()}: {addresses:.2f}"


@pytest.mark.parametrize(
    "of_family",
    ([*SM80, *BACKWARD_SM80], sorted(set(INSTANCES) - {*SM80, *BACKWARD_SM80})),
    ids=("sm80", "sm75"),
)
def test_the_page_of_registers_is_current(compiled, of_family, tmp_path):
    found = [compiled(name) for name in of_family]
    assert missing(rows(found, tmp_path)) == [], "run python scripts/gpu_registers.py"
