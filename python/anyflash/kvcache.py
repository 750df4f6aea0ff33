"""anyflash.attention_kvcache: append to a key/value cache in place, and attend over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _autocast, _numbers, backends
from ._operators.kvcache import KVCacheCall, attend_over_cache
from .attention import contiguous_last_dim


def attention_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Writes k and v behind each sequence of the caches, then computes attention of q over the
    caches.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k_cache: (batch_cache, capacity, heads_k, head_dim); with block_table (num_blocks,
            page_size, heads_k, head_dim). Changed in place.
        v_cache: k_cache's shape; its last dimension may differ. Changed in place.
        k: (batch, seqlen_new, heads_k, head_dim) to append, at rows cache_seqlens and following.
        v: like k.
        rotary_cos: (seqlen_rotary, rotary_dim / 2) in q's dtype; with it, q and k are rotated.
            Under autocast q, k, v and these tables become the caches' dtype.
        rotary_sin: like rotary_cos.
        cache_seqlens: (batch,) int32, keys in the cache before the call; an int for all; None: the
            whole cache.
        cache_batch_idx: (batch,) int32, the row of the cache that belongs to each sequence.
        cache_leftpad: (batch,) int32, leading rows to skip.
        block_table: (batch, max_blocks) int32, the pages of each sequence.
        alibi_slopes: (heads,) or (batch, heads) fp32.
        sinks: (heads,).
        softmax_scale: None: head_dim ** -0.5; a tensor of one element as in anyflash.attention.
        causal, window_size, softcap: as in anyflash.attention.
        rotary_interleaved: rotate neighbours; False: elements half of rotary_dim apart.
        return_lse: also return the log-sum-exp.
        backend: comma list of back ends to try for this call.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v); with return_lse (out, lse), lse (batch, heads,
        seqlen_q).

    Raises:
        RuntimeError: arguments that do not fit together, or a cache that overflows. A backward
            through the result raises it too: there is no gradient.
        ValueError: an unknown back end.
        TypeError: q or a cache is not a tensor, or an option not a number.
    """
    given: dict[str, Any] = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name not in ("k", "v")):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if _autocast.is_enabled(q):
        new = (k, v, rotary_cos, rotary_sin)
        q, k, v, rotary_cos, rotary_sin = _autocast.cast(q, *new, cache=k_cache)
    if cache_seqlens is not None and not isinstance(cache_seqlens, Tensor):
        cache_seqlens = _numbers.integer("cache_seqlens", cache_seqlens)
        cache_seqlens = torch.full((q.size(0),), cache_seqlens, dtype=torch.int32, device=q.device)
    if softmax_scale is None:
        softmax_scale = q.size(-1) ** -0.5 if q.dim() and q.size(-1) else 1.0
    else:
        q, softmax_scale = _numbers.scaled(q, softmax_scale)
    window_size_left, window_size_right = _numbers.window(window_size)
    call = KVCacheCall(
        q=contiguous_last_dim(q), k_cache=k_cache, v_cache=v_cache, k=k, v=v,
        rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, block_table=block_table,
        alibi_slopes=alibi_slopes, sinks=sinks, softmax_scale=softmax_scale, causal=causal,
        window_size_left=window_size_left, window_size_right=window_size_right,
        softcap=_numbers.real("softcap", softcap),
        rotary_interleaved=rotary_interleaved, return_lse=return_lse,
        backend=backends.resolve(backend),
    )  # fmt: skip
    out, lse = attend_over_cache(call)
    return (out, lse) if return_lse else out
