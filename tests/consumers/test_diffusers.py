"""diffusers' attention dispatch with its FlashAttention 2 back ends, which have no CUDA gate."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import compare

pytest.importorskip("diffusers", minversion="0.36", reason="diffusers is not installed")
from diffusers.models import attention_dispatch  # noqa: E402


def _qkv(requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 24, 4, 16, generator=generator).requires_grad_(requires_grad) for _ in "qkv"
    ]


@pytest.mark.shows("found", "imported")
def test_it_takes_flash_attn():
    assert attention_dispatch._CAN_USE_FLASH_ATTN
    assert attention_dispatch.flash_attn_func.__module__.startswith("flash_attn")


@pytest.mark.shows("forward", "backward")
@pytest.mark.parametrize("backend", ["flash", "flash_varlen"])
@pytest.mark.parametrize("causal", [False, True])
def test_dispatch(monkeypatch, backend, causal):
    monkeypatch.setattr(attention_dispatch, "DIFFUSERS_ENABLE_HUB_KERNELS", False, raising=False)
    q, k, v = _qkv()
    results = []
    for name in (backend, "native"):
        out = attention_dispatch.dispatch_attention_fn(q, k, v, is_causal=causal, backend=name)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for mine, expected in zip(*results):
        compare(mine, expected)


@pytest.mark.shows("forward", "backward")
@pytest.mark.parametrize("dropout_p", [0.0, 1e-30])
def test_operators_of_context_parallelism(dropout_p):
    """They call _wrapped_flash_attn_{forward, backward} with positions alone."""
    q, k, v = _qkv()
    ctx = SimpleNamespace()
    ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
    with torch.no_grad():
        out, lse = attention_dispatch._flash_attention_forward_op(
            ctx, q, k, v, dropout_p=dropout_p, return_lse=True
        )
    assert lse.shape == (2, 24, 4)
    expected = attention_dispatch.dispatch_attention_fn(q, k, v, backend="native")
    compare(out, expected)
    dout = torch.randn_like(out)
    with torch.no_grad():
        gradients = attention_dispatch._flash_attention_backward_op(ctx, dout)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, (q, k, v), dout)):
        compare(mine, theirs)


@pytest.mark.shows("compiled")
@pytest.mark.parametrize("backend", ["flash", "flash_varlen"])
def test_compile(backend):
    """Forward and backward as graphs. Without Inductor, whose C++ takes most of a minute here."""
    q, k, v = _qkv()
    results = []
    for function in (torch.compile(_dispatch, backend="aot_eager"), _dispatch):
        out = function(q, k, v, backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    compare(*results)


def _dispatch(q, k, v, backend):
    return attention_dispatch.dispatch_attention_fn(q * 1.0, k, v, backend=backend)
