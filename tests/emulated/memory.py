"""The memory that a forward and backward take on the CUDA kernels, on the emulator.

python tests/emulated/memory.py LIBRARY SEQLEN HEADS HEADS_K HEAD_DIM DETERMINISTIC

LIBRARY is libkernels_on_emulator.so. Writes as JSON the most bytes that torch's allocator holds
beside the inputs and dout, in the forward and in the backward.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from training import stand_in_for_gpu

from anyflash import attention


def peak(step: Callable[[], object]) -> tuple[object, int]:
    """What the step returns, and the most bytes that it had allocated beside what was there."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = step()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return result, most


def main() -> None:
    library, *numbers, deterministic = sys.argv[1:]
    seqlen, heads, heads_k, head_dim = map(int, numbers)
    stand_in_for_gpu(pathlib.Path(library))

    def leaf(heads: int) -> Tensor:
        return torch.randn(1, seqlen, heads, head_dim, dtype=torch.bfloat16).requires_grad_()

    q, k, v = leaf(heads), leaf(heads_k), leaf(heads_k)
    dout = torch.randn_like(q)

    def forward() -> Tensor:
        options = {"causal": True, "deterministic": deterministic == "True"}
        return attention(q, k, v, backend="kernel", **options)

    torch.autograd.grad(forward(), (q, k, v), dout)  # what is made once
    out, in_forward = peak(forward)
    _, in_backward = peak(lambda: torch.autograd.grad(out, (q, k, v), dout))
    print(json.dumps([in_forward, in_backward]))


if __name__ == "__main__":
    main()
