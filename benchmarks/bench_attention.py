"""CPU attention through `flash_attn`, beside PyTorch's scaled_dot_product_attention (SDPA)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Callable

import torch
import torch.nn.functional as F
from benchmarks.measure import Row, interleaved
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from torch import Tensor

HEADS, HEAD_DIM = 8, 64
# 16 sequences of 32 to 1024 tokens, shuffled: mean 444, so that padding more than doubles the work.
LENGTHS = (1024, 64, 480, 32, 736, 128, 320, 896, 96, 192, 608, 256, 1000, 48, 800, 416)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# The goals, as ratios to the reference of the row: (fp32, bf16, fp16), or one for all.
DENSE = {
    (64, False): (1.15, 2.3, 2.1),
    (64, True): (1.6, 3.0, 2.8),
    (128, False): (1.12, 2.2, 1.75),
    (128, True): (1.5, 2.9, 2.3),
}
BOTH = {False: (1.3, 2.0, 10.0), True: (1.7, 2.5, 14.0)}
PACKED_LOOP, PACKED_PADDED = (1.25, 2.4, 2.4), (2.5, 4.8, 4.0)
WINDOW = (6.0, 8.0, 8.0)
DECODE = {(32, 32): 0.85, (32, 8): 0.85}


def rows() -> Iterator[Row]:
    torch.manual_seed(0)
    for index, (name, dtype) in enumerate(DTYPES.items()):
        for (head_dim, causal), goals in DENSE.items():
            yield _dense(name, dtype, head_dim, causal, goals[index])
        for causal, goals in BOTH.items():
            yield _dense_both(name, dtype, causal, goals[index])
        yield from _packed(name, dtype, PACKED_LOOP[index], PACKED_PADDED[index])
        yield _window(name, dtype, WINDOW[index])
        for (heads, heads_k), goal in DECODE.items():
            yield _decode(name, dtype, heads, heads_k, goal)
    yield from _bottom_right_causal(1, 2048, 2304)
    yield from _bottom_right_causal(2, 512, 1024)


def _inputs(*lengths: int, dtype: torch.dtype, batch: int = 2, head_dim: int = 64) -> list[Tensor]:
    """(batch, length, heads, head_dim) for each length, asking for gradients."""
    shapes = [(batch, n, HEADS, head_dim) for n in lengths]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def _forward(ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> list[float]:
    """Median ms (ours, theirs) without gradients."""
    with torch.no_grad():
        return [1e3 * t for t in interleaved(ours, theirs)]


def _both(
    ours: Callable[[], Tensor], theirs: Callable[[], Tensor], inputs: list[Tensor]
) -> list[float]:
    """Median ms (ours, theirs) of forward and backward."""
    dout = torch.randn_like(ours())

    def step(function: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), inputs, dout)

    return [1e3 * t for t in interleaved(step(ours), step(theirs))]


def _dense(name: str, dtype: torch.dtype, head_dim: int, causal: bool, goal: float) -> Row:
    q, k, v = _inputs(1024, 1024, 1024, dtype=dtype, head_dim=head_dim)
    times = _forward(
        lambda: flash_attn_func(q, k, v, causal=causal), lambda: _sdpa(q, k, v, is_causal=causal)
    )
    label = f"dense {name}{' causal' if causal else ''} b2 h8 s1024 d{head_dim}"
    return Row.speed(f"{label}, forward (ms)", *times, at_least=goal)


def _dense_both(name: str, dtype: torch.dtype, causal: bool, goal: float) -> Row:
    q, k, v = _inputs(1024, 1024, 1024, dtype=dtype)
    times = _both(
        lambda: flash_attn_func(q, k, v, causal=causal),
        lambda: _sdpa(q, k, v, is_causal=causal),
        [q, k, v],
    )
    label = f"dense {name}{' causal' if causal else ''} b2 h8 s1024 d64"
    return Row.speed(f"{label}, forward+backward (ms)", *times, at_least=goal)


def _bottom_right_causal(batch: int, seqlen_q: int, seqlen_k: int) -> Iterator[Row]:
    """Queries at the end of a longer context: SDPA's causal flag does not fit, it needs a mask."""
    q, k, v = _inputs(seqlen_q, seqlen_k, seqlen_k, dtype=torch.float32, batch=batch)
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).tril(seqlen_k - seqlen_q)

    def ours() -> Tensor:
        return flash_attn_func(q, k, v, causal=True)

    def theirs() -> Tensor:
        return _sdpa(q, k, v, attn_mask=visible)

    label = f"causal fp32 b{batch} h8 sq{seqlen_q} sk{seqlen_k} d64 vs SDPA with a mask"
    yield Row.speed(f"{label}, forward (ms)", *_forward(ours, theirs), at_least=1.5)
    yield Row.speed(
        f"{label}, forward+backward (ms)", *_both(ours, theirs, [q, k, v]), at_least=1.5
    )


def _packed(name: str, dtype: torch.dtype, loop_goal: float, padded_goal: float) -> Iterator[Row]:
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    ends = cu_seqlens.tolist()
    longest = max(LENGTHS)
    packed = [t[0].detach() for t in _inputs(*[sum(LENGTHS)] * 3, dtype=dtype, batch=1)]
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

    label = f"packed {name}, {len(LENGTHS)} sequences of 32..1024, h8 d64"
    for reference, what, goal in (
        (loop, "SDPA per sequence", loop_goal),
        (padded, "padded SDPA", padded_goal),
    ):
        times = _forward(ours, reference)
        yield Row.speed(f"{label} vs {what}, forward (ms)", *times, at_least=goal)


def _pad(t: Tensor, valid: Tensor) -> Tensor:
    out = t.new_zeros(*valid.shape, *t.shape[1:])
    return out.masked_scatter(valid[..., None, None], t)


def _window(name: str, dtype: torch.dtype, goal: float) -> Row:
    seqlen, window = 4096, 256
    q, k, v = _inputs(seqlen, seqlen, seqlen, dtype=dtype, batch=1)
    row, column = torch.arange(seqlen)[:, None], torch.arange(seqlen)[None, :]
    visible = (column <= row) & (column > row - window)
    times = _forward(
        lambda: flash_attn_func(q, k, v, causal=True, window_size=(window - 1, 0)),
        lambda: _sdpa(q, k, v, attn_mask=visible),
    )
    label = f"window {window} of s{seqlen} {name} causal b1 h8 d64 vs SDPA with a mask"
    return Row.speed(f"{label}, forward (ms)", *times, at_least=goal)


def _decode(name: str, dtype: torch.dtype, heads: int, heads_k: int, goal: float) -> Row:
    """One new token against 4096 keys, as a share of the rate at which memory can be read."""
    batch, keys, head_dim = 8, 4096, 128
    q = torch.randn(batch, 1, heads, head_dim).to(dtype)
    k, v = (torch.randn(batch, keys, heads_k, head_dim).to(dtype) for _ in range(2))
    seqlens = torch.full((batch,), keys, dtype=torch.int32)
    memory = torch.ones(1 << 27)
    ours, read = interleaved(
        lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=seqlens), memory.sum, seconds=6.0
    )
    rate = 2 * k.numel() * k.element_size() / ours / 1e9
    label = f"decode {name} b8 sq1 sk4096 h{heads}/{heads_k} d128, of the read bandwidth (GB/s)"
    return Row.share(label, rate, memory.numel() * 4 / read / 1e9, at_least=goal)
