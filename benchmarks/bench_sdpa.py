"""PyTorch's scaled_dot_product_attention of CPU tensors with anyflash.accelerate_sdpa, beside the
same without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from benchmarks.measure import Row, accelerated, interleaved

BATCH, HEADS, SEQLEN, HEAD_DIM = 2, 8, 1024, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# The goals, as ratios: (forward, forward + backward).
GOALS = {"fp32": (1.5, 1.4), "bf16": (2.5, 1.6)}
CALLS = 1000  # of the tiny case in one timing


def rows() -> Iterator[Row]:
    torch.manual_seed(0)
    for name, dtype in DTYPES.items():
        for kind in ("full", "causal", "padded"):
            for backward, goal in zip((False, True), GOALS[name]):
                yield _row(name, dtype, kind, backward, goal)
        yield _cache(name, dtype)
        yield _jagged(name, dtype)
    yield _tiny()


def _row(name: str, dtype: torch.dtype, kind: str, backward: bool, goal: float) -> Row:
    shape = (BATCH, HEADS, SEQLEN, HEAD_DIM)
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_(backward) for _ in "qkv")
    dout = torch.randn(shape).to(dtype)
    mask = None
    if kind == "padded":
        mask = (torch.arange(SEQLEN) < torch.tensor([[SEQLEN], [700]]))[:, None, None]

    def step() -> None:
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=kind == "causal")
        if backward:
            torch.autograd.grad(out, (q, k, v), dout)

    times = [1e3 * t for t in interleaved(accelerated(step), step)]
    direction = "forward+backward" if backward else "forward"
    label = f"scaled_dot_product_attention {name} {kind} b2 h8 s1024 d64, {direction} (ms)"
    return Row.speed(label, *times, at_least=goal)


def _on_one_thread(function: Callable[[], object]) -> list[float]:
    """Seconds of the function, accelerated and not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = interleaved(accelerated(function), function)
    torch.set_num_threads(threads)
    return times


def _cache(name: str, dtype: torch.dtype) -> Row:
    """A token after 1024 others, whose mask hides the rest of a preallocated cache."""
    q = torch.randn(8, 12, 1, HEAD_DIM).to(dtype)
    k, v = (torch.randn(8, 12, 2048, HEAD_DIM).to(dtype) for _ in "kv")
    mask = (torch.arange(2048) <= SEQLEN).expand(8, 1, 1, 2048)

    def step() -> None:
        F.scaled_dot_product_attention(q, k, v, mask)

    times = [1e3 * t for t in _on_one_thread(step)]
    label = (
        f"scaled_dot_product_attention {name} b8 h12 s1 d64, half a cache of 2048, 1 thread (ms)"
    )
    return Row.speed(label, *times, at_least=2)


def _jagged(name: str, dtype: torch.dtype) -> Row:
    """Sequences of 32 to 1024 tokens as a nested tensor."""
    sequences = [torch.randn(n, HEADS, HEAD_DIM).to(dtype) for n in range(32, 1025, 62)]
    x = torch.nested.nested_tensor(sequences, layout=torch.jagged).transpose(1, 2)

    def step() -> None:
        F.scaled_dot_product_attention(x, x, x)

    times = [1e3 * t for t in interleaved(accelerated(step), step)]
    label = f"scaled_dot_product_attention {name} jagged, 17 sequences of 32..1024, h8 d64 (ms)"
    return Row.speed(label, *times, at_least=2)


def _tiny() -> Row:
    """What a call costs that computes next to nothing: the way through Python, on one thread."""
    q = torch.randn(1, 2, 4, 16)

    def calls() -> None:
        for _ in range(CALLS):
            F.scaled_dot_product_attention(q, q, q)

    times = [1e6 * t / CALLS for t in _on_one_thread(calls)]
    label = "scaled_dot_product_attention fp32 b1 h2 s4 d16, one thread, forward (us)"
    return Row.excess(label, *times, at_most=20, unit="us")
