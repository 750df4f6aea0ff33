"""Numbers as callers give them: Python's, NumPy's, tensors of one element, symbolic ones."""

from __future__ import annotations

import numpy
import pytest
import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    pad_input,
    unpad_input,
)
from support import torch_version

import anyflash

pytestmark = pytest.mark.providers


def _qkv(device, *shape, **options):
    torch.manual_seed(0)
    return [torch.randn(shape, device=device, **options) for _ in "qkv"]


NUMBERS = {
    "softmax_scale": [0.3, numpy.float32(0.3), torch.tensor(0.3), torch.tensor([0.3])],
    "softcap": [2.0, 2, numpy.float64(2.0), torch.tensor(2.0)],
    "window_size": [(2, 1), [2, 1], torch.tensor([2, 1]), (numpy.int64(2), numpy.int64(1))],
    "dropout_p": [0.5, numpy.float32(0.5), torch.tensor(0.5)],
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("function", [anyflash.attention, flash_attn_func])
def test_every_kind_of_number_is_the_same_number(device, function, name):
    q, k, v = _qkv(device, 1, 7, 2, 8)
    results = []
    for value in NUMBERS[name]:
        torch.manual_seed(1)
        results.append(function(q, k, v, **{name: value}))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_lengths_may_be_tensors_and_numpys(device):
    q, k, v = _qkv(device, 9, 2, 8)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    right = flash_attn_varlen_func(q, k, v, cu, cu, 5, 5)
    for five in (torch.tensor(5), cu.diff().max(), numpy.int32(5)):
        assert torch.equal(flash_attn_varlen_func(q, k, v, cu, cu, five, five), right)
    caches = _qkv(device, 1, 9, 2, 8)[1:]
    q = q[None, :1]
    right = flash_attn_with_kvcache(q, *caches, cache_seqlens=5)
    assert torch.equal(anyflash.attention_kvcache(q, *caches, cache_seqlens=numpy.int64(5)), right)


def _plain(q, k, v, scale):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("value", [0.3, 0.0, -0.2])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_a_learned_scale_gets_its_gradient(device, shape, value, compiled):
    q, k, v = _qkv(device, 1, 7, 2, 8)
    scale = torch.full(shape, value, device=device, requires_grad=True)
    function = anyflash.attention
    if compiled:
        if torch_version() < 204:
            pytest.skip("a graph of it needs torch 2.4")
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    function(q, k, v, softmax_scale=scale).pow(2).sum().backward()
    exact = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    _plain(*(x.double().cpu() for x in (q, k, v)), exact).pow(2).sum().backward()
    torch.testing.assert_close(
        scale.grad.double().cpu().reshape(()), exact.grad, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("call", ["dense", "packed", "paged"])
def test_slopes_that_ask_for_a_gradient_are_refused_in_the_backward(device, call):
    slopes = torch.rand(2, device=device, requires_grad=True)
    q, k, v = _qkv(device, 8, 2, 8)
    cu = torch.tensor([0, 4, 8], dtype=torch.int32, device=device)
    if call == "dense":
        out = flash_attn_func(q[None], k[None], v[None], alibi_slopes=slopes)
    else:
        table = torch.tensor([[0], [1]], dtype=torch.int32, device=device)
        pages = {"block_table": table} if call == "paged" else {}
        if pages:
            k, v = k.view(2, 4, 2, 8), v.view(2, 4, 2, 8)
        out = flash_attn_varlen_func(q, k, v, cu, cu, 4, 4, alibi_slopes=slopes, **pages)
    with pytest.raises(RuntimeError, match="block_table" if call == "paged" else "alibi_slopes"):
        out.sum().backward()


def test_second_derivatives_of_padding(device):
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], device=device)
    x = torch.randn(2, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    indices = unpad_input(x, mask)[1]

    def through(x):
        packed = unpad_input(x, mask)[0]
        return pad_input(packed.pow(3), indices, 2, 3)

    assert torch.autograd.gradgradcheck(through, x)
    twice = torch.tensor([0, 2, 2], device=device)
    flat = x.detach().flatten(0, 1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: index_first_axis(x, twice).pow(3), flat)
    assert torch.autograd.gradgradcheck(
        lambda x: index_first_axis_residual(x.pow(2), twice)[0].pow(2), flat
    )
    batched = torch.stack([x.detach(), 2 * x.detach()])
    one = torch.func.grad(lambda x: through(x).sum())
    found = torch.vmap(one)(batched)
    torch.testing.assert_close(found, torch.stack([one(x) for x in batched]))


class Packed(torch.nn.Module):
    def forward(self, q, cu):
        longest = cu.diff().max().item()
        return flash_attn_varlen_func(q, q, q, cu, cu, longest, longest, causal=True)


class Padded(torch.nn.Module):
    def forward(self, x, mask):
        packed, indices, cu, longest, _ = unpad_input(x, mask)
        out = flash_attn_varlen_func(packed, packed, packed, cu, cu, longest, longest)
        return pad_input(out, indices, *mask.shape)


@pytest.mark.skipif(torch_version() < 207, reason="exports of numbers from data, as torch 2.7 does")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("model", [Packed(), Padded()], ids=["packed", "padded"])
def test_an_export_keeps_lengths_that_come_from_data(device, model, strict):
    if isinstance(model, Packed):
        data = torch.randn(16, 2, 8, device=device)
        given = [torch.tensor([0, n, 16], dtype=torch.int32, device=device) for n in (4, 9)]
    else:
        data = torch.randn(2, 5, 2, 8, device=device)
        masks = ([[1, 1, 1, 0, 0], [1] * 5], [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
        given = [torch.tensor(mask, device=device) for mask in masks]
    program = torch.export.export(model, (data, given[0]), strict=strict).module()
    torch.testing.assert_close(program(data, given[1]), model(data, given[1]))


# ---- One rule for autocast: the inputs of the products become its dtype.

HALF = torch.bfloat16


def _attention(q, k, v, bias):
    return anyflash.attention(q, k, v, bias=bias, sinks=torch.zeros(2, device=q.device))


def _operator(q, k, v, bias):
    return torch.ops.anyflash.flash_attn_func(q, k, v)


def _mlp(q, k, v, bias):
    return anyflash.fused_mlp(q.flatten(2), bias.new_ones(4, 16), None, bias.new_ones(6, 4), None)


def _activation(q, k, v, bias):
    return anyflash.bias_activation(q, bias.new_ones(8), activation="gelu_tanh")


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("call", [_attention, _operator, _mlp, _activation])
def test_autocast(device, call, graded, mixed):
    q, k, v = _qkv(device, 1, 7, 2, 8)
    bias = torch.randn(7, 7, device=device)
    if mixed:
        q = q.to(HALF)
    expected = call(*(x.to(HALF) for x in (q, k, v, bias)))
    q.requires_grad_(graded)
    with torch.autocast(device, dtype=HALF):
        out = call(q, k, v, bias)
    assert out.dtype == HALF
    assert torch.equal(out, expected)
