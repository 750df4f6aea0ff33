"""flash_attn.flash_attn_triton: attention with a bias, upstream's argument order and diagonal."""

from __future__ import annotations

import pytest
import torch
from flash_attn import flash_attn_triton as triton_attention

pytestmark = pytest.mark.providers

LENGTHS = [(9, 9), (5, 12), (12, 5), (1, 7)]
BIASES = [None, "vector", "matrix", "matrix of a head"]


def _reference(q, k, v, bias, causal, scale):
    """float64, masked with the diagonal that starts at the first key."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (scale or q.shape[-1] ** -0.5)
    if bias is not None:
        scores = scores + bias.double()
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


def _inputs(seqlen_q, seqlen_k, kind, dtype):
    torch.manual_seed(seqlen_q * 100 + seqlen_k)
    q = torch.randn(2, seqlen_q, 3, 16).to(dtype).requires_grad_()
    kv = torch.randn(2, seqlen_k, 2, 3, 16).to(dtype).requires_grad_()
    shapes = {
        "vector": (1, 3, 1, seqlen_k),
        "matrix": (2, 3, seqlen_q, seqlen_k),
        "matrix of a head": (1, 1, seqlen_q, seqlen_k),
    }
    bias = None if kind is None else torch.randn(shapes[kind]).to(dtype).requires_grad_()
    return q, kv, bias


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_values_and_gradients(lengths, causal, kind):
    q, kv, bias = _inputs(*lengths, kind, torch.float64)
    out = triton_attention.flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], bias, causal, 0.3)
    expected = _reference(q, kv[:, :, 0], kv[:, :, 1], bias, causal, 0.3)
    torch.testing.assert_close(out, expected)
    leaves = [x for x in (q, kv, bias) if x is not None]
    dout = torch.randn_like(out)
    for got, wanted in zip(
        torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout)
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_packed_forms_are_the_same_call(dtype):
    q, kv, bias = _inputs(6, 6, "matrix", dtype)
    expected = _reference(q, kv[:, :, 0], kv[:, :, 1], bias, True, None).float()
    qkv = torch.cat([q.unsqueeze(2), kv], dim=2)
    for out in (
        triton_attention.flash_attn_kvpacked_func(q, kv, bias, True),
        triton_attention.flash_attn_qkvpacked_func(qkv, bias, causal=True),
        triton_attention.FlashAttnFunc.apply(q, kv[:, :, 0], kv[:, :, 1], bias, True),
        triton_attention.FlashAttnKVPackedFunc.apply(q, kv, bias, True),
        triton_attention.FlashAttnQKVPackedFunc.apply(qkv, bias, True),
    ):
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)


def test_a_bias_of_another_shape_is_an_error():
    q, kv, _ = _inputs(6, 8, None, torch.float32)
    for shape in ((2, 3, 6, 1), (2, 3, 8, 6)):
        with pytest.raises(RuntimeError, match="Last 2 dimensions of bias must be"):
            triton_attention.flash_attn_kvpacked_func(q, kv, torch.zeros(shape))


@pytest.mark.parametrize("causal", [False, True])
def test_a_bias_has_four_dimensions(causal):
    q, kv, _ = _inputs(6, 8, None, torch.float32)
    for shape in ((6, 8), (3, 6, 8)):
        with pytest.raises(RuntimeError, match="bias: expected 4 dimensions, .* got .*6, 8"):
            triton_attention.flash_attn_kvpacked_func(q, kv, torch.zeros(shape), causal)


def test_the_hook_clears_the_argument():
    arguments = {"dq": torch.ones(3), "dk": torch.ones(3)}
    triton_attention.init_to_zero("dq")(arguments)
    assert not arguments["dq"].any() and arguments["dk"].all()
