"""Layer norm and RMS norm with a residual, 8192 x 2048, 2 threads, beside PyTorch's norm of a sum.
Both give the norm and the sum, as a block before its next layer needs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Callable

import torch
import torch.nn.functional as F
from benchmarks.measure import Row, interleaved
from torch import Tensor

import anyflash

SHAPE, EPS = (8192, 2048), 1e-5
FORWARD, BOTH = 1.8, 1.4


def rows() -> Iterator[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            yield from _layer_norm(dtype, name)
            yield from _rms_norm(dtype, name)
    finally:
        torch.set_num_threads(threads)


def _layer_norm(dtype: torch.dtype, name: str) -> Iterator[Row]:
    x, residual = (torch.randn(SHAPE, dtype=dtype) for _ in range(2))
    weight, bias = (torch.randn(SHAPE[1], dtype=dtype) for _ in range(2))

    def ours() -> Any:
        return anyflash.layer_norm(x, weight, bias, residual, eps=EPS, prenorm=True)

    def reference() -> Any:
        total = x + residual
        return F.layer_norm(total, SHAPE[1:], weight, bias, EPS), total

    yield from _compare(f"layer_norm {name}", ours, reference, [x, residual, weight, bias])


def _rms_norm(dtype: torch.dtype, name: str) -> Iterator[Row]:
    x, residual = (torch.randn(SHAPE, dtype=dtype) for _ in range(2))
    weight = torch.randn(SHAPE[1], dtype=dtype)

    def ours() -> Any:
        return anyflash.rms_norm(x, weight, None, residual, eps=EPS, prenorm=True)

    def reference() -> Any:
        total = x + residual
        return F.rms_norm(total, SHAPE[1:], weight, EPS), total

    yield from _compare(f"rms_norm {name}", ours, reference, [x, residual, weight])


def _compare(
    name: str, ours: Callable[[], Any], reference: Callable[[], Any], leaves: list[Tensor]
) -> Iterator[Row]:
    with torch.no_grad():
        times = interleaved(ours, reference)
    yield Row.speed(f"{name} with residual, forward (ms)", *(1e3 * t for t in times), FORWARD)
    for leaf in leaves:
        leaf.requires_grad_()
    gradients = [torch.randn_like(leaves[0]) for _ in range(2)]
    times = interleaved(
        lambda: torch.autograd.grad(ours(), leaves, gradients),
        lambda: torch.autograd.grad(reference(), leaves, gradients),
    )
    yield Row.speed(f"{name} with residual, forward+backward (ms)", *(1e3 * t for t in times), BOTH)
