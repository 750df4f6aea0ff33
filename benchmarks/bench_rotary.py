"""Rotary embedding in place, b4 s2048 h16 d128: against its formula in PyTorch operations, and
against copying as many bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from benchmarks.measure import Row, interleaved
from torch import Tensor

import anyflash

# Goals over the formula.
SPEEDUP = {torch.float32: 4.0, torch.bfloat16: 6.0}
OF_A_COPY = 0.7


def formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (batch, seqlen, heads, head_dim) turned, cos and sin (seqlen, 1, head_dim / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def rows() -> Iterator[Row]:
    for dtype, at_least in SPEEDUP.items():
        yield from _of(dtype, at_least)


def _of(dtype: torch.dtype, at_least: float) -> Iterator[Row]:
    name = f"rotary in place b4 s2048 h16 d128 {str(dtype).removeprefix('torch.')}"
    x = torch.randn(4, 2048, 16, 128).to(dtype)
    y = torch.randn_like(x)
    theta = torch.arange(2048)[:, None] * 10000.0 ** (-torch.arange(64) / 64)
    cos, sin = theta.cos().to(dtype), theta.sin().to(dtype)
    ours, torch_ops, copy = interleaved(
        lambda: anyflash.rotary(x, cos, sin, inplace=True),
        lambda: formula(x, cos[:, None], sin[:, None]),
        lambda: x.copy_(y),
    )
    yield Row.speed(f"{name} (s)", ours, torch_ops, at_least)
    gigabytes = 2e-9 * x.nbytes  # each element is read and written once
    yield Row.share(f"{name} (GB/s)", gigabytes / ours, gigabytes / copy, OF_A_COPY)
