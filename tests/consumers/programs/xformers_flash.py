"""xformers' memory-efficient attention through its FlashAttention operators, every kind of mask.

Its operators are registered for CUDA; the same functions are registered for the CPU here, and its
device check is told so. Each bias is compared with the dense one that it materializes itself.
"""

from __future__ import annotations

import pytest
import torch
from helpers import compare, leaves
from xformers.ops import fmha
from xformers.ops.fmha import attn_bias as biases
from xformers.ops.fmha import flash

for operator in (flash._flash_fwd, flash._flash_bwd):
    operator.register_kernel("cpu")(operator._init_fn)
for kind in (flash.FwOp, flash.BwOp):
    kind.SUPPORTED_DEVICES = {"cpu"}
OPERATORS = (flash.FwOp, flash.BwOp)
HEADS, DIM, PAGE = 2, 32, 256

DENSE = {
    "none": (None, 12, 12),
    "causal": (biases.LowerTriangularMask(), 12, 12),
    "bottom right": (biases.LowerTriangularFromBottomRightMask(), 7, 12),
    "bottom right, local": (biases.LowerTriangularFromBottomRightLocalAttentionMask(4), 7, 12),
    "local": (biases.LocalAttentionFromBottomRightMask(window_left=3, window_right=2), 12, 12),
}
PACKED = {
    "block diagonal": biases.BlockDiagonalMask.from_seqlens([5, 9], [7, 9]),
    "causal": biases.BlockDiagonalMask.from_seqlens([5, 9]).make_causal(),
    "causal bottom right":
        biases.BlockDiagonalMask.from_seqlens([5, 9], [7, 9]).make_causal_from_bottomright(),
    "causal local": biases.BlockDiagonalMask.from_seqlens([5, 9]).make_local_attention(3),
}  # fmt: skip
_PADDED = {"q_seqlen": [1, 4], "kv_seqlen": [9, 5], "kv_padding": 12}
_GAPPY = {"q_seqlen": [2, 3], "kv_seqstarts": [1, 8, 20], "kv_seqlen": [4, 7]}
KEYS = {
    "padded": biases.BlockDiagonalPaddedKeysMask.from_seqlens(**_PADDED),
    "padded, causal": biases.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(**_PADDED),
    "padded, local": biases.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(
        **_PADDED, window_size=4
    ),
    "gappy": biases.BlockDiagonalGappyKeysMask.from_seqlens(**_GAPPY),
    "gappy, causal": biases.BlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(**_GAPPY),
}


def dense(q, k, v, bias):
    """fp32 attention with whatever the bias materializes to."""
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    if bias is not None:
        bias = bias.materialize((1, HEADS, q.shape[2], k.shape[2]))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)
    return out.transpose(1, 2)


def check(q, k, v, bias, backward=True):
    out = fmha.memory_efficient_attention(q, k, v, bias, op=OPERATORS)
    wanted = dense(q, k, v, bias)
    compare(out.float(), wanted, 0.03)
    if backward:
        found = torch.autograd.grad(out.float().sin().sum(), (q, k, v))
        expected = torch.autograd.grad(wanted.sin().sum(), (q, k, v))
        compare(found, expected, 0.06)


@pytest.mark.shows("found")
def test_it_is_found():
    assert flash.FLASH_VERSION == "2.8.3"


@pytest.mark.shows("imported")
def test_it_calls_the_raw_module():
    import flash_attn_2_cuda

    assert flash._flash_attn_cuda is flash_attn_2_cuda


@pytest.mark.shows("forward", "backward")
@pytest.mark.parametrize("name", DENSE)
def test_dense(name):
    bias, seqlen_q, seqlen_k = DENSE[name]
    k_shape = (2, seqlen_k, HEADS, DIM)
    check(*leaves((2, seqlen_q, HEADS, DIM), k_shape, k_shape, dtype=torch.float16), bias)


@pytest.mark.shows("forward", "backward")
@pytest.mark.parametrize("name", PACKED)
def test_packed(name):
    bias = PACKED[name]
    q, k = bias.q_seqinfo.seqstart_py[-1], bias.k_seqinfo.seqstart_py[-1]
    shapes = [(1, n, HEADS, DIM) for n in (q, k, k)]
    check(*leaves(*shapes, dtype=torch.float16), bias)


@pytest.mark.shows("forward")
@pytest.mark.parametrize("name", KEYS)
def test_padded_and_gappy_keys(name):
    bias = KEYS[name]
    q, k = bias.q_seqinfo.seqstart_py[-1], bias.k_seqinfo.seqstart_py[-1]
    shapes = [(1, n, HEADS, DIM) for n in (q, k, k)]
    with torch.no_grad():
        check(*leaves(*shapes, dtype=torch.float16), bias, backward=False)


@pytest.mark.shows("forward")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("gappy", [False, True])
def test_paged_keys(gappy, causal):
    tables = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    kind = "CausalWithOffset" * causal + ("Gappy" if gappy else "Padded") + "KeysMask"
    row = {"q_seqlen": [2, 3], "kv_seqlen": [260, 40]}
    paged = getattr(biases, f"PagedBlockDiagonal{kind}")
    if gappy:  # from_seqlens of the paged kind wants as many starts as lengths, and one more
        unpaged = getattr(biases, f"BlockDiagonal{kind}")
        bias = unpaged.from_seqlens(**row, kv_seqstarts=[0, 2 * PAGE, 4 * PAGE]).make_paged(
            tables, PAGE, 2 * PAGE, paged
        )
    else:
        bias = paged.from_seqlens(**row, block_tables=tables, page_size=PAGE)
    if paged not in flash.FwOp.SUPPORTED_ATTN_BIAS_TYPES:
        pytest.skip(f"xformers itself: {paged.__name__} is not for its flash operators")
    shapes = [(1, 5, HEADS, DIM), *[(1, 4 * PAGE, HEADS, DIM)] * 2]
    q, k, v = leaves(*shapes, dtype=torch.float16)
    with torch.no_grad():
        out = fmha.memory_efficient_attention_forward(q, k, v, bias, op=flash.FwOp)
        mask = bias.materialize((1, HEADS, 5, 4 * PAGE))
        wanted = torch.nn.functional.scaled_dot_product_attention(
            *(x.float().transpose(1, 2) for x in (q, k, v)), mask
        )
    compare(out.float(), wanted.transpose(1, 2), 0.03)


@pytest.mark.shows("forward", "backward")
def test_grouped_heads_and_one_buffer():
    """Slices of one qkv tensor, whose gradients go into one buffer."""
    (qkv,) = leaves((2, 9, 3, HEADS, DIM), dtype=torch.float16)
    out = fmha.memory_efficient_attention(*qkv.unbind(2), op=OPERATORS)
    wanted = dense(*qkv.unbind(2), None)
    compare(out.float(), wanted, 0.03)
    (found,) = torch.autograd.grad(out.float().sin().sum(), qkv)
    (expected,) = torch.autograd.grad(wanted.sin().sum(), qkv)
    compare(found, expected, 0.06)


@pytest.mark.shows("compiled")
def test_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tensors = leaves(*[(1, 9, HEADS, DIM)] * 3, dtype=torch.float16)

    def step(q, k, v):
        return fmha.memory_efficient_attention(q * 1, k, v, op=OPERATORS)

    out = torch.compile(step)(*tensors)
    compare(out.float(), dense(*tensors, None), 0.03)
