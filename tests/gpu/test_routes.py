"""PyTorch's attention routines of GPUs at lengths and sizes that the decision does not look at."""

from __future__ import annotations

import functools

import pytest
import torch

import anyflash
from anyflash.testing import assert_close, reference

ROUTES = ("aten_cudnn", "aten_flash", "aten_efficient")
LENGTHS = ((1, 1), (1, 5), (5, 1), (1, 4097), (7, 129), (130, 130), (513, 1000), (2048, 2048))
HEAD_DIMS = (8, 64, 72, 128)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_every_length(route, lengths, head_dim, dtype):
    torch.manual_seed(0)
    seqlen_q, seqlen_k = lengths
    q, k, v, dout = (
        torch.randn(2, seqlen, 3, head_dim, device="cuda", dtype=dtype)
        for seqlen in (seqlen_q, seqlen_k, seqlen_k, seqlen_q)
    )
    if not anyflash.explain(*(x.requires_grad_() for x in (q, k, v)), backend=route).runs:
        pytest.skip(f"{route} does not run here")

    def results(attend, to):
        leaves = [x.detach().to(to).requires_grad_() for x in (q, k, v)]
        out, lse = attend(*leaves)
        gradients = torch.autograd.grad(out, leaves, dout.to(to))
        return out.detach(), lse.detach(), *gradients

    found = results(functools.partial(anyflash.attention, return_lse=True, backend=route), dtype)
    exact, low = results(reference, torch.float64), results(reference, dtype)
    low[1].copy_(results(reference, torch.float32)[1] + 2.0**-14)  # as anyflash.testing.expect
    for name, *one in zip(("out", "lse", "dq", "dk", "dv"), found, exact, low):
        assert_close(*one, name)
