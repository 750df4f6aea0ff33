"""What MHA and ParallelMHA share: heads, rotary embedding, inner attention, key/value cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.checkpoint
from einops import rearrange
from torch import Tensor, nn

from flash_attn.flash_attn_interface import flash_attn_with_kvcache
from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.utils.distributed import get_dim_for_local_rank

from ._inner_attention import CrossAttention, FlashCrossAttention, FlashSelfAttention, SelfAttention


def get_alibi_slopes(nheads: int) -> list[float]:
    """Slopes of ALiBi (Press et al. 2022, as published with the paper).

    A power of two of heads has 2 ** (-8 i / nheads), i from 1. Other numbers take the slopes of the
    next lower power of two, then every other one of the next higher.
    """
    lower = 1 << (nheads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * i / lower) for i in range(1, lower + 1)]
    if lower == nheads:
        return slopes
    return slopes + get_alibi_slopes(2 * lower)[::2][: nheads - lower]


def _update_kv_cache(kv: Tensor, inference_params: Any, layer_idx: int) -> Tensor:
    """Writes kv (batch, seqlen, 2, heads_k, head_dim) into the layer's cache, which it makes when
    there is none, at seqlen_offset. Returns all of these sequences' keys and values up to there."""
    caches = inference_params.key_value_memory_dict
    if layer_idx not in caches:
        size = (inference_params.max_batch_size, inference_params.max_seqlen, *kv.shape[2:])
        caches[layer_idx] = kv.new_empty(size)
    cache = caches[layer_idx]
    first, start = inference_params.batch_size_offset, inference_params.seqlen_offset
    last, end = first + kv.shape[0], start + kv.shape[1]
    if last > cache.shape[0] or end > cache.shape[1]:
        raise ValueError(
            f"inference_params: expected a cache of at least {last} sequences of {end} tokens, "
            f"got {cache.shape[0]} of {cache.shape[1]}"
        )
    cache[first:last, start:end] = kv
    return cache[first:last, :end]


def _positions(inference_params: Any) -> dict[str, Any]:
    """Where the new tokens stand, as RotaryEmbedding takes it."""
    if inference_params is None:
        return {"seqlen_offset": 0, "max_seqlen": None}
    lengths = inference_params.lengths_per_sample
    offset = inference_params.seqlen_offset if lengths is None else lengths
    return {"seqlen_offset": offset, "max_seqlen": inference_params.max_seqlen}


class _Attention(nn.Module):
    """What MHA and ParallelMHA share: all but the projections."""

    out_proj: nn.Linear

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None,
        dropout: float,
        softmax_scale: float | None,
        causal: bool,
        layer_idx: int | None,
        rotary_emb_dim: int,
        rotary_emb_base: float,
        rotary_emb_scale_base: float | None,
        rotary_emb_interleaved: bool,
        use_alibi: bool,
        window_size: tuple[int, int],
        use_flash_attn: bool,
        checkpointing: bool,
        device: Any,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.causal = causal
        self.layer_idx = layer_idx
        self.rotary_emb_dim = rotary_emb_dim
        self.use_flash_attn = use_flash_attn
        self.checkpointing = checkpointing
        self.num_heads = num_heads
        self.num_heads_kv = num_heads_kv if num_heads_kv is not None else num_heads
        if num_heads < 1 or self.num_heads_kv < 1:
            raise ValueError(
                "num_heads, num_heads_kv: expected at least 1, "
                f"got {num_heads} and {self.num_heads_kv}"
            )
        if num_heads % self.num_heads_kv:
            raise ValueError(
                "num_heads must be divisible by num_heads_kv, "
                f"got {num_heads} and {self.num_heads_kv}"
            )
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}"
            )
        if self.num_heads_kv < world_size:
            raise ValueError(
                f"process_group: expected at most {self.num_heads_kv} processes, one per key head, "
                f"got {world_size}"
            )
        if use_alibi and not use_flash_attn:
            raise ValueError("ALiBi code path requires flash_attn: expected use_flash_attn=True")
        if tuple(window_size) != (-1, -1) and not use_flash_attn:
            raise ValueError(
                "Local (sliding window) attention code path requires flash_attn: expected "
                f"use_flash_attn=True with window_size {window_size}"
            )
        self.head_dim = embed_dim // num_heads
        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim,
                base=rotary_emb_base,
                scale_base=rotary_emb_scale_base,
                interleaved=rotary_emb_interleaved,
                device=device,
            )
        options: dict[str, Any] = {
            "causal": causal, "softmax_scale": softmax_scale, "attention_dropout": dropout
        }  # fmt: skip
        self.inner_attn: FlashSelfAttention | SelfAttention
        self.inner_cross_attn: FlashCrossAttention | CrossAttention
        if use_flash_attn:
            options["window_size"] = window_size
            if use_alibi:
                slopes = get_alibi_slopes(num_heads)[self._query_heads_of(rank, world_size)]
                options["alibi_slopes"] = torch.tensor(slopes, device=device)
            self.inner_attn = FlashSelfAttention(**options)
            self.inner_cross_attn = FlashCrossAttention(**options)
        else:
            self.inner_attn = SelfAttention(**options)
            self.inner_cross_attn = CrossAttention(**options)

    def _query_heads_of(self, rank: int, world_size: int) -> slice:
        """A process computes whole groups: key heads, and the query heads that read them."""
        shares = [get_dim_for_local_rank(self.num_heads_kv, world_size, r) for r in range(rank + 1)]
        group = self.num_heads // self.num_heads_kv
        return slice(sum(shares[:rank]) * group, sum(shares) * group)

    def _own_heads(self) -> tuple[int, int]:
        """Heads of queries, and of keys, that are computed here."""
        raise NotImplementedError

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """An uninitialised cache (batch_size, max_seqlen, 2, heads_k, head_dim); dtype None: that
        of the weights."""
        size = (batch_size, max_seqlen, 2, self._own_heads()[1], self.head_dim)
        return self.out_proj.weight.new_empty(size, dtype=dtype)

    def _update_kv_cache(self, kv: Tensor, inference_params: Any) -> Tensor:
        if self.layer_idx is None:
            raise ValueError("Generation requires layer_idx in the constructor")
        return _update_kv_cache(kv, inference_params, self.layer_idx)

    def _rotates_in_cache(self, inference_params: Any) -> bool:
        """Whether the call over the cache applies the rotary embedding too: as upstream's kernel,
        for dims that are a multiple of 16 and without xPos."""
        return (
            inference_params is not None
            and inference_params.seqlen_offset > 0
            and self.use_flash_attn
            and self.rotary_emb_dim > 0
            and self.rotary_emb_dim % 16 == 0
            and self.rotary_emb.scale is None
        )

    def _decode(self, q: Tensor, kv: Tensor, inference_params: Any, **rotary: Any) -> Tensor:
        """Appends kv to the cache and attends over it."""
        if self.layer_idx is None:
            raise ValueError("Generation requires layer_idx in the constructor")
        first = inference_params.batch_size_offset
        rows = slice(first, first + q.shape[0])
        # The graph of an earlier call ends here: attention over a cache has no gradient.
        cache = inference_params.key_value_memory_dict[self.layer_idx][rows].detach()
        lengths = inference_params.lengths_per_sample
        inner: Any = self.inner_cross_attn
        if self.use_flash_attn:
            rotary.update(window_size=inner.window_size, alibi_slopes=inner.slopes())
        return flash_attn_with_kvcache(
            q,
            cache[:, :, 0],
            cache[:, :, 1],
            kv[:, :, 0],
            kv[:, :, 1],
            cache_seqlens=inference_params.seqlen_offset if lengths is None else lengths[rows],
            softmax_scale=inner.softmax_scale,
            causal=inner.causal,
            **rotary,
        )

    def _apply_rotary_update_kvcache_attention(
        self, q: Tensor, kv: Tensor, inference_params: Any
    ) -> Tensor:
        """The rotary embedding of q (batch, seqlen, heads, head_dim) and kv (batch, seqlen, 2,
        heads_k, head_dim), the update of the cache and attention over it, in one call."""
        self.rotary_emb._update_cos_sin_cache(
            inference_params.max_seqlen, device=q.device, dtype=q.dtype
        )
        return self._decode(
            q,
            kv,
            inference_params,
            rotary_cos=self.rotary_emb._cos_cached,
            rotary_sin=self.rotary_emb._sin_cached,
            rotary_interleaved=self.rotary_emb.interleaved,
        )

    def _update_kvcache_attention(self, q: Tensor, kv: Tensor, inference_params: Any) -> Tensor:
        """Writes kv to the cache, then attends over it."""
        # Attention written out knows one length for all sequences.
        one_length = not self.use_flash_attn and inference_params.lengths_per_sample is None
        if inference_params.seqlen_offset == 0 or one_length:
            return self.inner_cross_attn(q, self._update_kv_cache(kv, inference_params))
        return self._decode(q, kv, inference_params)

    def _run(self, attention: nn.Module, *tensors: Tensor, **options: Any) -> Tensor:
        if self.checkpointing:
            return torch.utils.checkpoint.checkpoint(
                attention, *tensors, use_reentrant=False, **options
            )
        return attention(*tensors, **options)

    def _attend(self, q: Tensor, kv: Tensor, inference_params: Any, **options: Any) -> Tensor:
        """q (..., heads, head_dim) to kv (..., 2, heads_k, head_dim)."""
        if self._rotates_in_cache(inference_params):
            return self._apply_rotary_update_kvcache_attention(q, kv, inference_params)
        if self.rotary_emb_dim > 0:
            q, kv = self.rotary_emb(q, kv, **_positions(inference_params))
        if inference_params is None:
            return self._run(self.inner_cross_attn, q, kv, **options)
        return self._update_kvcache_attention(q, kv, inference_params)

    def _attend_self(self, qkv: Tensor, inference_params: Any, **options: Any) -> Tensor:
        """qkv (..., (heads + 2 heads_k) * head_dim): queries, then keys, then values."""
        heads, heads_k = self._own_heads()
        if heads == heads_k and inference_params is None:
            qkv = rearrange(qkv, "... (three h d) -> ... three h d", three=3, d=self.head_dim)
            if self.rotary_emb_dim > 0:
                qkv = self.rotary_emb(qkv, **_positions(None))
            return self._run(self.inner_attn, qkv, **options)
        # Slices, not split(): the rotary embedding turns them in place.
        q, kv = qkv[..., : heads * self.head_dim], qkv[..., heads * self.head_dim :]
        return self._attend(self._in_heads(q), self._in_heads(kv, 2), inference_params, **options)

    def _in_heads(self, x: Tensor, parts: int = 1) -> Tensor:
        """(..., heads, head_dim), or (..., parts, heads, head_dim)."""
        shape = (-1, self.head_dim) if parts == 1 else (parts, -1, self.head_dim)
        return x.unflatten(-1, shape)
