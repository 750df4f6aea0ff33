"""FusedMLP of 2048 rows, 768 -> 3072 -> 768, bf16, beside the same layers in nn.Sequential: a
training step, two threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.measure import Row, interleaved, peak_bytes
from flash_attn.modules.mlp import FusedMLP
from torch import nn

ROWS, FEATURES, HIDDEN = 2048, 768, 3072
WHAT = "FusedMLP 2048 x 768 -> 3072 bf16, forward+backward"


def rows() -> Iterator[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield from _rows()
    finally:
        torch.set_num_threads(threads)


def _rows() -> Iterator[Row]:
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, HIDDEN), nn.GELU(approximate="tanh"), nn.Linear(HIDDEN, FEATURES)]
    plain = _step(nn.Sequential(*layers))
    saved, recomputed = (_step(FusedMLP(FEATURES, HIDDEN, checkpoint_lvl=lv)) for lv in (0, 2))
    times = [1e3 * t for t in interleaved(saved, recomputed, plain, seconds=6)]
    yield Row.speed(f"{WHAT}, checkpoint_lvl 0 (ms)", times[0], times[2], at_least=1)
    yield Row.speed(f"{WHAT}, checkpoint_lvl 2 (ms)", times[1], times[2], at_least=0.8)
    peaks = [peak_bytes(step) / 2**20 for step in (saved, recomputed, plain)]
    yield Row.part(f"{WHAT}, checkpoint_lvl 0, peak (MiB)", peaks[0], peaks[2], at_most=1)
    yield Row.part(f"{WHAT}, checkpoint_lvl 2, peak (MiB)", peaks[1], peaks[2], at_most=0.6)


def _step(model: nn.Module) -> Callable[[], Any]:
    """One forward and backward, the gradients handed back."""
    model = model.bfloat16()
    x = torch.randn(ROWS, FEATURES, dtype=torch.bfloat16, requires_grad=True)
    dout = torch.randn(ROWS, FEATURES, dtype=torch.bfloat16)
    leaves = [x, *model.parameters()]
    return lambda: torch.autograd.grad(model(x), leaves, dout)
