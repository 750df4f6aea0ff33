"""What anyflash.rotary and flash_attn.layers.rotary refuse, in which words, before any write."""

from __future__ import annotations

import flash_attn.layers.rotary as layers
import pytest
import torch
from rotary_support import angles

import anyflash

pytestmark = pytest.mark.providers


def _ints(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


COS, SIN = angles(7, 4)
PACKED = {"cu_seqlens": _ints(0, 2, 5), "max_seqlen": 3}
BAD = {
    "rank": (dict(x=torch.zeros(5, 2, 8)), r"x: expected \(batch, seqlen, heads, head_dim\)"),
    "rank packed": (dict(x=torch.zeros(1, 5, 2, 8), **PACKED), r"x: expected \(total"),
    "dtype": (dict(x=torch.zeros(1, 5, 2, 8, dtype=torch.int32)), "x: expected fp16.*got int32"),
    "tables' rank": (dict(cos=COS[None]), r"cos: expected \(seqlen_rotary, rotary_dim / 2\)"),
    "tables' dtype": (dict(sin=SIN.int()), "sin: expected a floating dtype, got int32"),
    "tables' device": (
        dict(cos=COS.to("meta")),
        "cos.* expected (x's device )?cpu.* got (meta|another device)",
    ),
    "unlike tables": (dict(sin=SIN[:, :3]), r"sin: expected cos' \(7, 4\), got \(7, 3\)"),
    "wide tables": (
        dict(x=torch.zeros(1, 5, 2, 7)),
        r"rotary_dim must be <= headdim.*cos with rotary_dim / 2 = 4 for x \(1, 5, 2, 7\)",
    ),
    "short tables": (
        dict(x=torch.zeros(1, 8, 2, 8)),
        "seqlen_ro must be >= seqlen: cos and sin have 7 rows, x takes 8 from row 0 on",
    ),
    "offset beyond": (dict(seqlen_offsets=3), "seqlen_ro must be >= seqlen.*5 from row 3 on"),
    "offset huge": (dict(seqlen_offsets=2**63 - 1), "seqlen_ro must be >= seqlen"),
    "offset below 0": (dict(seqlen_offsets=-1), "seqlen_offsets: expected 0 or more, got -1"),
    "an offset below 0": (
        dict(seqlen_offsets=_ints(-2)),
        "seqlen_offsets: expected 0 or more, got -2 for sequence 0",
    ),
    "offsets' number": (dict(seqlen_offsets=_ints(1, 2)), r"seqlen_offsets: expected \(batch,\)"),
    "offsets' dtype": (dict(seqlen_offsets=COS[0, :1]), "seqlen_offsets: expected int32 or int64"),
    "offsets' rank": (dict(seqlen_offsets=_ints(1)[None]), "seqlen_offsets: expected one dim"),
    "no max_seqlen": (
        dict(x=torch.zeros(5, 2, 8), cu_seqlens=_ints(0, 5)),
        "If cu_seqlens is passed in, then max_seqlen must be passed",
    ),
    "small max_seqlen": (
        dict(x=torch.zeros(5, 2, 8), cu_seqlens=_ints(0, 2, 5), max_seqlen=2),
        "max_seqlen: expected at least 3, the length of sequence 1",
    ),
    "big max_seqlen": (
        dict(x=torch.zeros(5, 2, 8), cu_seqlens=_ints(0, 5), max_seqlen=8),
        "seqlen_ro must be >= seqlen",
    ),
    "max_seqlen below 0": (
        dict(x=torch.zeros(5, 2, 8), cu_seqlens=_ints(0), max_seqlen=-1),
        "max_seqlen: expected 0 or more, got -1",
    ),
    "cu_seqlens' start": (
        dict(x=torch.zeros(5, 2, 8), cu_seqlens=_ints(1, 5), max_seqlen=5),
        "cu_seqlens: expected to start at 0, got 1",
    ),
    "cu_seqlens fall": (
        dict(x=torch.zeros(5, 2, 8), cu_seqlens=_ints(0, 3, 2), max_seqlen=5),
        "cu_seqlens: must not decrease, got 3 and then 2",
    ),
    "cu_seqlens beyond": (
        dict(x=torch.zeros(5, 2, 8), cu_seqlens=_ints(0, 6), max_seqlen=6),
        "cu_seqlens: ends at 6, but x has 5 rows",
    ),
    "no cu_seqlens": (
        dict(x=torch.zeros(5, 2, 8), cu_seqlens=_ints(), max_seqlen=5),
        r"cu_seqlens: expected \(batch \+ 1,\), got \(0,\)",
    ),
    "cu_seqlens' dtype": (
        dict(x=torch.zeros(5, 2, 8), cu_seqlens=torch.zeros(2), max_seqlen=5),
        "cu_seqlens: expected int32 or int64, got fp32",
    ),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("math", [False, True])
@pytest.mark.parametrize("what", list(BAD))
def test_bad_input(what, math, inplace):
    changes, message = BAD[what]
    arguments = {"x": torch.zeros(1, 5, 2, 8), "cos": COS, "sin": SIN, **changes}
    x = arguments.pop("x").clone().fill_(1)
    with (
        anyflash.backend("math" if math else "kernel, math"),
        pytest.raises(RuntimeError, match=message),
    ):
        anyflash.rotary(x, inplace=inplace, **arguments)
    assert (x == 1).all()


def test_more_bad_input():
    x = torch.ones(1, 5, 2, 8)
    with pytest.raises(TypeError, match="cos: expected a torch.Tensor, got NoneType"):
        anyflash.rotary(x, None, SIN)
    with pytest.raises(TypeError, match="seqlen_offsets: expected an integer .* got 1.5"):
        anyflash.rotary(x, COS, SIN, seqlen_offsets=1.5)
    with pytest.raises(TypeError, match="seqlen_offset: expected an integer .* got 1.5"):
        layers.RotaryEmbedding(8)(torch.ones(1, 5, 3, 2, 8), seqlen_offset=1.5)
    with pytest.raises(RuntimeError, match="memory of its own.*expanded"):
        anyflash.rotary(x[:, :1].expand(1, 5, 2, 8), COS, SIN, inplace=True)
    with pytest.raises(ImportError, match="apply_rotary"):
        from flash_attn.ops.triton.rotary import rotary_kernel  # noqa: F401
    for dim in (7, 0, -2, 8.5):
        with pytest.raises(ValueError, match=f"dim: expected a positive even .* got {dim}"):
            layers.RotaryEmbedding(dim)
    for base in (0, -1.0):
        with pytest.raises(ValueError, match=f"base: expected a positive number, got {base}"):
            layers.RotaryEmbedding(8, base)
    with pytest.raises(RuntimeError, match="cos: expected at most 4 columns"):
        layers.apply_rotary_emb_torch(x, torch.ones(5, 5), torch.ones(5, 5))


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((1, 5, 6, 8), {}, "num_heads_q: missing"),
        ((1, 5, 6, 8), {"num_heads_q": 3}, "num_heads_q: expected .* = 6 heads of qkv"),
        ((1, 5, 6, 8), {"num_heads_q": 8}, "num_heads_q: expected .* = 6 heads of qkv"),
        ((1, 5, 2, 2, 8), {}, r"qkv: expected \(batch, seqlen, 3, nheads, headdim\)"),
        ((5, 6, 8), {}, "qkv: expected"),
        ((1, 5, 3, 2, 8), {"cos_k": COS[:, :3]}, "cos_k: expected cos'"),
        ((1, 5, 3, 2, 8), {"cos_k": COS, "sin_k": SIN.bfloat16()}, "sin_k: expected cos'"),
        ((1, 8, 3, 2, 8), {"cos_k": COS, "sin_k": SIN}, "seqlen_ro must be >= seqlen"),
    ],
)
def test_bad_qkv(shape, options, message):
    qkv = torch.ones(shape)
    with pytest.raises(RuntimeError, match=message):
        layers.apply_rotary_emb_qkv_(qkv, COS, SIN, **options)
    assert (qkv == 1).all()


def test_bad_kv():
    kv = torch.ones(1, 5, 3, 2, 8)
    with pytest.raises(RuntimeError, match=r"kv: expected \(batch, seqlen, 2, nheads, headdim\)"):
        layers.apply_rotary_emb_kv_(kv, COS, SIN)
