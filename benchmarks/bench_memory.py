"""The most memory that a long forward and backward take, beside PyTorch's
scaled_dot_product_attention (SDPA): everything the process holds, scratch memory included."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Callable

import torch
import torch.nn.functional as F
from benchmarks.measure import Row
from torch import Tensor

SEQLEN, HEADS, HEAD_DIM = 32768, 8, 64


def rows() -> Iterator[Row]:
    ours, theirs = (_in_a_child(name) / 2**20 for name in STEPS)
    label = f"causal fp32 b1 h{HEADS} s{SEQLEN} d{HEAD_DIM}, forward+backward, memory (MiB)"
    yield Row.part(label, ours, theirs, at_most=1)


def _ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(q, k, v, causal=True)
    return out


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


STEPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"ours": _ours, "sdpa": _sdpa}


def _in_a_child(name: str) -> int:
    """Bytes in a fresh process, whose allocators hold nothing that others left there."""
    command = [sys.executable, "-m", "benchmarks.bench_memory", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _resident(field: str) -> int:
    """Bytes of this process in RAM: VmRSS now, VmHWM at most since the peak was reset (Linux)."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _peak_of(name: str) -> int:
    """Peak of the step's memory beside its inputs. A short step loads what is loaded once."""

    def step(*inputs: Tensor) -> None:
        torch.autograd.grad(STEPS[name](*inputs).sum(), inputs)

    def inputs(length: int) -> list[Tensor]:
        return [torch.randn(1, length, HEADS, HEAD_DIM, requires_grad=True) for _ in "qkv"]

    step(*inputs(128))
    long = inputs(SEQLEN)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    step(*long)
    return _resident("VmHWM") - before


if __name__ == "__main__":
    print(_peak_of(sys.argv[1]))
