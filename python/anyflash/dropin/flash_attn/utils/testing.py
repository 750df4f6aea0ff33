"""What upstream's tests compare with: attention written out, padding masks, packed inputs."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from flash_attn.bert_padding import pad_input, unpad_input

# Where a padded key goes, so that no query is as far.
_OUT_OF_REACH = 2**32


def generate_random_padding_mask(
    max_seqlen: int, batch_size: int, device: Any, mode: str = "random", zero_lengths: bool = False
) -> Tensor:
    """(batch_size, max_seqlen) bool, true for tokens, which come first.

    Args:
        mode: "full": all; "random": up to 20 are missing; "third": at least a third is there.
        zero_lengths: every fifth sequence, and the last, has none.

    Raises:
        ValueError: another mode.
    """
    place = torch.arange(max_seqlen, device=device)
    if mode == "full":
        lengths = place.new_full((batch_size, 1), max_seqlen)
    elif mode in ("random", "third"):
        shortest = max_seqlen // 3 if mode == "third" else max(1 - zero_lengths, max_seqlen - 20)
        lengths = torch.randint(shortest, max_seqlen + 1, (batch_size, 1), device=device)
    else:
        raise ValueError(f"mode: expected 'full', 'random' or 'third', got {mode!r}")
    if zero_lengths:
        lengths[::5] = 0
        lengths[-1:] = 0
    return place < lengths


class _Packing:
    """One of two ways from (batch, seqlen, ...) to tokens that lie end to end, and back."""

    def __init__(self, x: Tensor, padding_mask: Tensor | None, unused_mask: Tensor | None) -> None:
        self.batch, self.seqlen = x.shape[:2]
        if padding_mask is None:
            self.indices, self.max_seqlen, self.seqused = None, self.seqlen, None
            self.cu_seqlens = torch.arange(
                0, (self.batch + 1) * self.seqlen, self.seqlen, dtype=torch.int32, device=x.device
            )
        else:
            _, self.indices, self.cu_seqlens, self.max_seqlen, self.seqused = unpad_input(
                x, padding_mask, unused_mask
            )

    def unpad(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        return tokens if self.indices is None else tokens[self.indices]

    def pad(self, x: Tensor) -> Tensor:
        if self.indices is None:
            return x.unflatten(0, (self.batch, self.seqlen))
        return pad_input(x, self.indices, self.batch, self.seqlen)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def generate_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    qv: Tensor | None = None,
    kvpacked: bool = False,
    qkvpacked: bool = False,
    query_unused_mask: Tensor | None = None,
    key_unused_mask: Tensor | None = None,
) -> tuple[Any, ...]:
    """Inputs of the packed functions, and of the padded ones that compute the same.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k: (batch, seqlen_k, heads_k, head_dim).
        v: (batch, seqlen_k, heads_k, head_dim_v).
        query_padding_mask: (batch, seqlen_q) bool, true: a token. None: all are.
        key_padding_mask: (batch, seqlen_k).
        qv: (batch, seqlen_q, heads, head_dim_v).
        kvpacked: keys and values in one tensor.
        qkvpacked: all in one tensor.
        query_unused_mask: (batch, seqlen_q), true: in the packed tensors, but not in use.
        key_unused_mask: (batch, seqlen_k).

    Returns:
        (q_unpad, k_unpad, v_unpad, qv_unpad, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, q, k, v, qv, output_pad_fn, dq_pad_fn, dk_pad_fn); kvpacked:
        (q_unpad, kv_unpad, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, kv,
        output_pad_fn, dq_pad_fn, dkv_pad_fn); qkvpacked: (qkv_unpad, cu_seqlens_q, max_seqlen_q,
        qkv, output_pad_fn, dqkv_pad_fn). Tensors are leaves that require a gradient, but for qv;
        the functions bring packed tensors back into the padded shape.

    Raises:
        ValueError: arguments that do not fit together.
    """
    if kvpacked and qkvpacked:
        raise ValueError("kvpacked, qkvpacked: expected at most one")
    if (kvpacked or qkvpacked) and (query_unused_mask is not None or key_unused_mask is not None):
        raise ValueError("query_unused_mask, key_unused_mask: expected None with packed tensors")
    queries = _Packing(q, query_padding_mask, query_unused_mask)
    keys = _Packing(k, key_padding_mask, key_unused_mask)
    q_unpad, k_unpad, v_unpad = queries.unpad(q), keys.unpad(k), keys.unpad(v)
    if qkvpacked:
        if query_padding_mask is None or key_padding_mask is None:
            one_mask = query_padding_mask is key_padding_mask
        else:
            one_mask = bool((query_padding_mask == key_padding_mask).all())
        if not one_mask or q.shape != k.shape:
            raise ValueError("qkvpacked: expected one shape and one padding mask for q and k")
        unpadded, padded = (q_unpad, k_unpad, v_unpad), (q, k, v)
        return (
            _leaf(torch.stack(unpadded, dim=-3)), queries.cu_seqlens, queries.max_seqlen,
            _leaf(torch.stack(padded, dim=-3)), queries.pad, queries.pad,
        )  # fmt: skip
    if kvpacked:
        return (
            _leaf(q_unpad), _leaf(torch.stack([k_unpad, v_unpad], dim=1)),
            queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen,
            _leaf(q), _leaf(torch.stack([k, v], dim=2)), queries.pad, queries.pad, keys.pad,
        )  # fmt: skip
    qv_unpad = None if qv is None else queries.unpad(qv).detach()
    return (
        _leaf(q_unpad), _leaf(k_unpad), _leaf(v_unpad), qv_unpad,
        queries.cu_seqlens, keys.cu_seqlens, queries.seqused, keys.seqused,
        queries.max_seqlen, keys.max_seqlen, _leaf(q), _leaf(k), _leaf(v),
        None if qv is None else qv.detach(), queries.pad, queries.pad, keys.pad,
    )  # fmt: skip


def _diagonal(
    seqlen_q: int,
    seqlen_k: int,
    query_padding_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    key_leftpad: Tensor | None,
    device: Any,
) -> tuple[Tensor, Tensor, Any]:
    """Of a mask (batch, 1, seqlen_q, seqlen_k), or (seqlen_q, seqlen_k): the last key that each row
    sees under causal, each column's place in its sequence, and the number of keys."""

    def count(mask: Tensor | None, seqlen: int) -> Any:
        return seqlen if mask is None else rearrange(mask.sum(-1), "b -> b 1 1 1")

    keys = count(key_padding_mask, seqlen_k)
    row = torch.arange(seqlen_q, device=device)[:, None]
    column = torch.arange(seqlen_k, device=device)
    if key_leftpad is not None:
        leftpad = rearrange(key_leftpad, "b -> b 1 1 1")
        column = torch.where(column >= leftpad, column - leftpad, _OUT_OF_REACH)
    return row + keys - count(query_padding_mask, seqlen_q), column, keys


def construct_local_mask(
    seqlen_q: int,
    seqlen_k: int,
    window_size: tuple[int | None, int | None] = (None, None),
    sink_token_length: int = 0,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    key_leftpad: Tensor | None = None,
    device: Any = None,
) -> Tensor:
    """True where a window hides a key.

    Args:
        window_size: keys to the left and right of the diagonal that are visible; None: all.
        sink_token_length: leading keys that the left side never hides.
        query_padding_mask: (batch, seqlen_q) bool; its lengths move the diagonal.
        key_padding_mask: (batch, seqlen_k) bool.
        key_leftpad: (batch,), leading places without a key.

    Returns:
        (seqlen_q, seqlen_k) bool, or (batch, 1, seqlen_q, seqlen_k).
    """
    last, column, keys = _diagonal(
        seqlen_q, seqlen_k, query_padding_mask, key_padding_mask, key_leftpad, device
    )
    left, right = window_size
    if left is None:
        return column > last + (seqlen_k if right is None else right)
    too_far_right = column > (keys if right is None else torch.clamp(last + right, max=keys))
    return too_far_right | ((column < last - left) & (column >= sink_token_length))


def construct_chunk_mask(
    seqlen_q: int,
    seqlen_k: int,
    attention_chunk: int,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    key_leftpad: Tensor | None = None,
    device: Any = None,
) -> Tensor:
    """True where a key lies in another chunk of attention_chunk keys than the diagonal of the row;
    others as construct_local_mask."""
    last, column, _ = _diagonal(
        seqlen_q, seqlen_k, query_padding_mask, key_padding_mask, key_leftpad, device
    )
    first = last - last % attention_chunk
    return (column < first) | (column >= first + attention_chunk)


def _upcast(x: Tensor) -> Tensor:
    """fp16 and bf16 in fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _descaled(x: Tensor, scale: Tensor | None, group: int = 1) -> Tensor:
    """x (batch, seqlen, heads, head_dim) times scale (batch, heads / group), in fp32."""
    if scale is None:
        return x
    return (_upcast(x) * repeat(scale, "b h -> b 1 (h g) 1", g=group)).to(x.dtype)


def _probabilities(scores: Tensor, sinks: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Softmax over scores, with one more logit per head (heads,) that has no value."""
    if sinks is None:
        return torch.softmax(scores, dim=-1).to(dtype)
    scores = _upcast(scores)
    sink = rearrange(sinks, "h -> h 1 1")
    largest = torch.maximum(scores.amax(dim=-1, keepdim=True), sink)
    weights = torch.exp(scores - largest)
    return (weights / (weights.sum(dim=-1, keepdim=True) + torch.exp(sink - largest))).to(dtype)


def _hidden_keys(
    seqlen_q: int,
    seqlen_k: int,
    window_size: tuple[int | None, int | None],
    attention_chunk: int,
    sink_token_length: int,
    place: dict[str, Any],
) -> Tensor:
    """What padding, window and chunk hide, broadcasting to (batch, heads, seqlen_q, seqlen_k);
    place: padding and device, as the masks take them."""
    hidden = torch.zeros((seqlen_q, seqlen_k), dtype=torch.bool, device=place["device"])
    if window_size[0] is not None or window_size[1] is not None:
        hidden = construct_local_mask(seqlen_q, seqlen_k, window_size, sink_token_length, **place)
    if attention_chunk > 0:
        hidden = hidden | construct_chunk_mask(seqlen_q, seqlen_k, attention_chunk, **place)
    if place["key_padding_mask"] is not None:
        hidden = hidden | ~place["key_padding_mask"][:, None, None, :]
    return hidden


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    key_leftpad: Tensor | None = None,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_mask: Tensor | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int | None, int | None] = (None, None),
    attention_chunk: int = 0,
    sink_token_length: int = 0,
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    upcast: bool = True,
    reorder_ops: bool = False,
    intermediate_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention written out in PyTorch operations.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k: (batch, seqlen_k, heads_k, head_dim); heads_k divides heads.
        v: (batch, seqlen_k, heads_k, head_dim_v).
        query_padding_mask: (batch, seqlen_q) bool, true: a token.
        key_padding_mask: (batch, seqlen_k) bool.
        key_leftpad: (batch,), leading places without a key, for window_size and attention_chunk.
        attn_bias: broadcasts to (batch, heads, seqlen_q, seqlen_k).
        dropout_p: what dropout_mask was drawn with.
        dropout_mask: (batch, heads, seqlen_q, seqlen_k) bool, true: kept.
        causal: query i sees keys up to i + seqlen_k - seqlen_q.
        qv: (batch, seqlen_q, heads, head_dim_v), whose product with v is added to the scores.
        q_descale, k_descale, v_descale: (batch, heads_k), factors.
        window_size: keys to the left and right of the diagonal that are visible; None: all.
        attention_chunk: > 0: only keys in the chunk of the diagonal are visible.
        sink_token_length: leading keys that the window's left side never hides.
        learnable_sink: (heads,), one more logit per head, without a value.
        softcap: > 0: scores become softcap * tanh(score / softcap).
        upcast: compute in fp32, or in fp64 for fp64.
        reorder_ops: scale k in place of q, to see how much rounding matters.
        intermediate_dtype: what probabilities are rounded to.

    Returns:
        out (batch, seqlen_q, heads, head_dim_v) and probabilities (batch, heads, seqlen_q,
        seqlen_k) before dropout, in q's dtype. Rows that see no key, and padded ones, are zero.
    """
    dtype = q.dtype
    seqlen_q, seqlen_k, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    if upcast:
        q, k, v = _upcast(q), _upcast(k), _upcast(v)
        qv = None if qv is None else _upcast(qv)
    q, k, v = _descaled(q, q_descale, group), _descaled(k, k_descale), _descaled(v, v_descale)
    k, v = (repeat(x, "b s h d -> b s (h g) d", g=group) for x in (k, v))
    width = q.shape[-1] + (0 if qv is None else v.shape[-1])
    scale = width**-0.5
    scores = torch.einsum("bthd,bshd->bhts", *((q, k * scale) if reorder_ops else (q * scale, k)))
    if qv is not None:
        qv = _descaled(qv, q_descale, group)
        scores = scores + torch.einsum("bthd,bshd->bhts", qv * scale, v)
    if softcap > 0.0:
        scores = torch.tanh(scores / softcap) * softcap
    place = dict(
        query_padding_mask=query_padding_mask, key_padding_mask=key_padding_mask,
        key_leftpad=key_leftpad, device=q.device,
    )  # fmt: skip
    window = (window_size[0], 0) if causal else window_size
    hidden = _hidden_keys(seqlen_q, seqlen_k, window, attention_chunk, sink_token_length, place)
    nothing = hidden.all(dim=-1, keepdim=True)
    # Not -inf in rows without a key: their NaN would spread in the backward.
    scores = scores.masked_fill(hidden & ~nothing, float("-inf"))
    if attn_bias is not None:
        scores = scores + attn_bias
    attention = _probabilities(scores, learnable_sink, v.dtype).masked_fill(nothing, 0.0)
    if query_padding_mask is not None:
        attention = attention.masked_fill(~query_padding_mask[:, None, :, None], 0.0)
    kept = attention if dropout_mask is None else attention.masked_fill(~dropout_mask, 0.0)
    if intermediate_dtype is not None:
        kept = kept.to(intermediate_dtype).to(kept.dtype)
    out = torch.einsum("bhts,bshd->bthd", kept, v * (1.0 / (1.0 - dropout_p)))
    if query_padding_mask is not None:
        out = out.masked_fill(~query_padding_mask[:, :, None, None], 0.0)
    return out.to(dtype), attention.to(dtype)
