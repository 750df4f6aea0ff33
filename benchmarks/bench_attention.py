"""CPU attention through `flash_attn`, beside PyTorch's scaled_dot_product_attention (SDPA)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Callable

import torch
import torch.nn.functional as F
from benchmarks.measure import Row, interleaved
from flash_attn import flash_attn_func, flash_attn_varlen_func
from torch import Tensor

HEADS, HEAD_DIM = 8, 64
# 16 sequences of 32 to 1024 tokens, shuffled: mean 444, so that padding more than doubles the work.
LENGTHS = (1024, 64, 480, 32, 736, 128, 320, 896, 96, 192, 608, 256, 1000, 48, 800, 416)


def rows() -> Iterator[Row]:
    torch.manual_seed(0)
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for causal in (False, True):
            yield from _dense(dtype, name, causal)
    yield from _bottom_right_causal(1, 2048, 2304)
    yield from _bottom_right_causal(2, 512, 1024)
    yield from _packed()


def _inputs(*lengths: int, dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    """(batch, length, heads, head_dim) for each length, asking for gradients."""
    shapes = [(batch, n, HEADS, HEAD_DIM) for n in lengths]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def _pair(
    ours: Callable[[], Tensor], theirs: Callable[[], Tensor], inputs: list[Tensor]
) -> tuple[list[float], list[float]]:
    """Median ms (ours, theirs): the forward without gradients, then forward with backward."""
    dout = torch.randn_like(ours())

    def step(function: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), inputs, dout)

    with torch.no_grad():
        forward = interleaved(ours, theirs)
    both = interleaved(step(ours), step(theirs))
    return [1e3 * t for t in forward], [1e3 * t for t in both]


def _dense(dtype: torch.dtype, name: str, causal: bool) -> Iterator[Row]:
    q, k, v = _inputs(1024, 1024, 1024, dtype=dtype)
    forward, both = _pair(
        lambda: flash_attn_func(q, k, v, causal=causal),
        lambda: _sdpa(q, k, v, is_causal=causal),
        [q, k, v],
    )
    label = f"dense {name}{' causal' if causal else ''} b2 h8 s1024 d64"
    yield Row.speed(f"{label}, forward (ms)", *forward, at_least=0.97)
    yield Row.speed(f"{label}, forward+backward (ms)", *both, at_least=0.97)


def _bottom_right_causal(batch: int, seqlen_q: int, seqlen_k: int) -> Iterator[Row]:
    """Queries at the end of a longer context: SDPA's causal flag does not fit, it needs a mask."""
    q, k, v = _inputs(seqlen_q, seqlen_k, seqlen_k, dtype=torch.float32, batch=batch)
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).tril(seqlen_k - seqlen_q)
    forward, both = _pair(
        lambda: flash_attn_func(q, k, v, causal=True),
        lambda: _sdpa(q, k, v, attn_mask=visible),
        [q, k, v],
    )
    label = f"causal fp32 b{batch} h8 sq{seqlen_q} sk{seqlen_k} d64 vs SDPA with a mask"
    yield Row.speed(f"{label}, forward (ms)", *forward, at_least=1.5)
    yield Row.speed(f"{label}, forward+backward (ms)", *both, at_least=1.5)


def _packed() -> Iterator[Row]:
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    ends = cu_seqlens.tolist()
    longest = max(LENGTHS)
    packed = [
        t.detach()[0].requires_grad_()
        for t in _inputs(*[sum(LENGTHS)] * 3, dtype=torch.float32, batch=1)
    ]
    valid = torch.arange(longest)[None, :] < torch.tensor(LENGTHS)[:, None]
    mask = valid[:, None, None, :]

    def ours() -> Tensor:
        return flash_attn_varlen_func(*packed, cu_seqlens, cu_seqlens, longest, longest)

    def padded() -> Tensor:
        q, k, v = (_pad(t, valid) for t in packed)
        return _sdpa(q, k, v, attn_mask=mask)[valid]

    def loop() -> Tensor:
        parts = [_sdpa(*(t[None, a:b] for t in packed))[0] for a, b in zip(ends, ends[1:])]
        return torch.cat(parts)

    label = f"packed fp32, {len(LENGTHS)} sequences of 32..1024, h8 d64"
    for reference, what, goal in ((padded, "padded SDPA", 1.9), (loop, "SDPA per sequence", 0.97)):
        forward, both = _pair(ours, reference, packed)
        yield Row.speed(f"{label} vs {what}, forward (ms)", *forward, at_least=goal)
        yield Row.speed(f"{label} vs {what}, forward+backward (ms)", *both, at_least=goal)


def _pad(t: Tensor, valid: Tensor) -> Tensor:
    out = t.new_zeros(*valid.shape, *t.shape[1:])
    return out.masked_scatter(valid[..., None, None], t)
