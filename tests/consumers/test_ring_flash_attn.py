"""ring-flash-attention on two CPU processes: keys go round, out and lse are merged."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from helpers import join_gloo, leave_gloo

if importlib.util.find_spec("ring_flash_attn") is None:
    pytest.skip("ring_flash_attn is not installed", allow_module_level=True)
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

RANKS, SEQLEN = 2, 32
VARIANTS = ("ring", "zigzag", "stripe")


def _import_ring():
    """The package without its adapter for transformers, which transformers 5 does not suit."""
    adapters = types.ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    sys.modules[adapters.__name__] = adapters
    import ring_flash_attn

    return ring_flash_attn


def _positions(variant: str, rank: int) -> torch.Tensor:
    """Which rows of the sequence a rank holds."""
    if variant == "ring":
        return torch.arange(SEQLEN).chunk(RANKS)[rank]
    if variant == "stripe":
        return torch.arange(rank, SEQLEN, RANKS)
    pieces = torch.arange(SEQLEN).chunk(2 * RANKS)
    return torch.cat([pieces[rank], pieces[2 * RANKS - 1 - rank]])


def _expected(tensors, dout):
    q, k, v = (x.float().transpose(1, 2).requires_grad_() for x in tensors)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    gradients = torch.autograd.grad(out, (q, k, v), dout.float().transpose(1, 2))
    return [x.transpose(1, 2) for x in (out, *gradients)]


def _worker(rank: int, folder: str) -> None:
    join_gloo(rank, folder, RANKS)
    ring = _import_ring()
    generator = torch.Generator().manual_seed(0)
    # bf16, as the package sums gradients in copies that fp32 tensors would not be.
    tensors = [torch.randn(2, SEQLEN, 4, 16, generator=generator).bfloat16() for _ in "qkv"]
    dout = torch.randn(2, SEQLEN, 4, 16, generator=generator).bfloat16()
    expected = _expected(tensors, dout)
    for variant in VARIANTS:
        name = {"ring": "ring", "zigzag": "zigzag_ring", "stripe": "stripe"}[variant]
        mine = _positions(variant, rank)
        local = [x[:, mine].contiguous().requires_grad_() for x in tensors]
        out = getattr(ring, f"{name}_flash_attn_func")(*local, causal=True)
        gradients = torch.autograd.grad(out, local, dout[:, mine].contiguous())
        for what, got, want in zip(("out", "dq", "dk", "dv"), (out, *gradients), expected):
            error = (got - want[:, mine]).abs().max().item()
            assert error < 0.05, f"{variant} {what} on rank {rank}: error {error:g}"
    leave_gloo(rank, folder, RANKS)


@pytest.mark.shows("found", "imported", "forward", "backward")
def test_ring_attention(tmp_path: Path):
    torch.multiprocessing.spawn(_worker, args=(str(tmp_path),), nprocs=RANKS)
