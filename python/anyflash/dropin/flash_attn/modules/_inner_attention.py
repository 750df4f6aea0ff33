"""The attention inside MHA, as modules without weights: through anyflash, or written out."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from flash_attn.flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

# What upstream adds to, or puts in place of, the score of a hidden key. Not -inf: a row without a
# visible key then has finite numbers.
_HIDDEN = -10000.0


class _FlashAttention(nn.Module):
    """The options that both flash modules have, and how they become arguments."""

    def __init__(
        self,
        causal: bool,
        softmax_scale: float | None,
        attention_dropout: float,
        window_size: tuple[int, int],
        alibi_slopes: Tensor | None,
        deterministic: bool,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.alibi_slopes: Tensor | None
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_size
        self.deterministic = deterministic

    def slopes(self) -> Tensor | None:
        """alibi_slopes in fp32, also after .half() of a model has rounded the buffer."""
        return None if self.alibi_slopes is None else self.alibi_slopes.float()

    def _options(self, causal: bool | None) -> dict[str, Any]:
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": self.slopes(),
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_FlashAttention):
    """Attention of one sequence, or of packed sequences, to itself.

    Any device, and fp16, bf16, fp32 or fp64; upstream asks for CUDA and 16 bits.

    Args:
        causal: query i sees keys up to i.
        softmax_scale: None: head_dim ** -0.5.
        attention_dropout: probability of dropping a probability, in training mode.
        window_size: keys to the left and right that are visible; -1: all.
        alibi_slopes: (heads,) or (batch, heads), kept as a buffer outside the state dict.
        deterministic: the backward adds in a fixed order.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__(
            causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic
        )

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            qkv: (batch, seqlen, 3, heads, head_dim); packed (total, 3, heads, head_dim).
            causal: in place of the module's.
            cu_seqlens: (batch + 1,) int32, where each packed sequence begins, and the end.
            max_seqlen: the longest of them.

        Returns:
            (batch, seqlen, heads, head_dim), or (total, heads, head_dim).

        Raises:
            RuntimeError: arguments that do not fit together.
        """
        options = self._options(causal)
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **options)
        options["max_seqlen"] = max_seqlen
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, **options)


class FlashCrossAttention(_FlashAttention):
    """Attention of queries to the keys and values of another sequence, or of a cache.

    Args: as FlashSelfAttention, in another order. causal: query i sees keys up to
        i + seqlen_k - seqlen_q.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__(
            causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic
        )

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            q: (batch, seqlen_q, heads, head_dim), or (total_q, heads, head_dim) with cu_seqlens.
            kv: (batch, seqlen_k, 2, heads_k, head_dim), or (total_k, 2, heads_k, head_dim).
            causal: in place of the module's.
            cu_seqlens: (batch + 1,) int32, where each packed sequence of q begins, and the end.
            max_seqlen: the longest of them.
            cu_seqlens_k: the same for kv.
            max_seqlen_k: the same for kv.

        Returns:
            q's shape.

        Raises:
            RuntimeError: arguments that do not fit together.
        """
        options = self._options(causal)
        if cu_seqlens is None and cu_seqlens_k is None:
            return flash_attn_kvpacked_func(q, kv, **options)
        if cu_seqlens is None or cu_seqlens_k is None:
            raise RuntimeError(
                "cu_seqlens, cu_seqlens_k: expected both or none, got "
                f"{'none' if cu_seqlens is None else 'one'} for q and "
                f"{'none' if cu_seqlens_k is None else 'one'} for kv"
            )
        options.update(max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen_k)
        return flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens_k, **options)


class _WrittenOutAttention(nn.Module):
    """Attention in PyTorch operations: probabilities in memory, dropout as nn.Dropout draws it."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def _scores(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """(batch, heads, seqlen_q, seqlen_k)"""
        scale = self.softmax_scale or q.shape[-1] ** -0.5
        scores = torch.einsum("bthd,bshd->bhts", q, k * scale)
        if key_padding_mask is None:
            return scores
        expected = (k.shape[0], k.shape[1])
        if key_padding_mask.dtype != torch.bool or key_padding_mask.shape != expected:
            raise ValueError(
                f"key_padding_mask: expected bool of {expected} with true = kept, got "
                f"{key_padding_mask.dtype} of {tuple(key_padding_mask.shape)}"
            )
        return scores + _HIDDEN * (~key_padding_mask[:, None, None, :]).to(scores.dtype)

    def _weighted(self, scores: Tensor, v: Tensor) -> Tensor:
        """(batch, seqlen_q, heads, head_dim)"""
        probabilities = self.drop(torch.softmax(scores, dim=-1, dtype=v.dtype))
        return torch.einsum("bhts,bshd->bthd", probabilities, v)


class SelfAttention(_WrittenOutAttention):
    """Attention of a sequence to itself, in PyTorch operations.

    Args:
        causal: query i sees keys up to i.
        softmax_scale: None: head_dim ** -0.5.
        attention_dropout: probability of dropping a probability, in training mode.
    """

    def forward(
        self, qkv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attends.

        Args:
            qkv: (batch, seqlen, 3, heads, head_dim).
            causal: in place of the module's.
            key_padding_mask: (batch, seqlen) bool, true: kept.

        Returns:
            (batch, seqlen, heads, head_dim).
        """
        q, k, v = qkv.unbind(dim=2)
        scores = self._scores(q, k, key_padding_mask)
        if self.causal if causal is None else causal:
            seqlen = qkv.shape[1]
            scores = scores + scores.new_full((seqlen, seqlen), _HIDDEN).triu(1)
        return self._weighted(scores, v)


class CrossAttention(_WrittenOutAttention):
    """Attention of queries to the keys and values of another sequence, in PyTorch operations.

    Args: as SelfAttention. causal: query i sees keys up to i + seqlen_k - seqlen_q, where seqlen_k
        counts the keys that key_padding_mask keeps.
    """

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            q: (batch, seqlen_q, heads, head_dim).
            kv: (batch, seqlen_k, 2, heads_k, head_dim); heads_k divides heads.
            causal: in place of the module's.
            key_padding_mask: (batch, seqlen_k) bool, true: kept.

        Returns:
            q's shape.
        """
        batch, seqlen_q, heads, head_dim = q.shape
        heads_k = kv.shape[3]
        if kv.shape[0] != batch or kv.shape[4] != head_dim or heads % heads_k:
            raise ValueError(
                f"kv: expected ({batch}, seqlen_k, 2, divisor of {heads}, {head_dim}) "
                f"beside q {tuple(q.shape)}, got {tuple(kv.shape)}"
            )
        k, v = repeat(kv, "... h d -> ... (h g) d", g=heads // heads_k).unbind(dim=2)
        scores = self._scores(q, k, key_padding_mask)
        if self.causal if causal is None else causal:
            keys: Any = k.shape[1]
            row = torch.arange(seqlen_q, device=q.device)[:, None]
            column = torch.arange(keys, device=q.device)
            if key_padding_mask is not None:
                keys = rearrange(key_padding_mask.sum(-1), "b -> b 1 1 1")
            scores = scores.masked_fill(column > row + keys - seqlen_q, _HIDDEN)
        return self._weighted(scores, v)
