"""The public operators, under the original library's names and defaults: the output alone comes
back (csrc/attention/flash_attn_api.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._activations import activation_number
from .._core import contiguous_rows
from . import mlp
from .attention import _flash_attn_forward
from .checks import check, shape_text
from .kvcache import _flash_attn_kvcache_


def _window(window_size: Sequence[int]) -> tuple[int, int]:
    check(
        len(window_size) == 2,
        f"window_size: expected (left, right), got {len(window_size)} numbers",
    )
    return window_size[0], window_size[1]


def _scale(softmax_scale: float | None, q: Tensor) -> float:
    if softmax_scale is not None:
        return softmax_scale
    check(
        q.dim() >= 1 and q.shape[-1] > 0,
        f"q: expected (..., heads, head_dim), got {shape_text(q)}",
    )
    return float(q.shape[-1] ** -0.5)


def _part(packed: Tensor, name: str, dim: int, parts: int, index: int) -> Tensor:
    """One of the tensors that lie beside each other in dimension ``dim``."""
    leading = "batch, seqlen, " if dim == 2 else "total, "
    check(
        packed.dim() == dim + 3 and packed.shape[dim] == parts,
        f"{name}: expected ({leading}{parts}, heads, head_dim), got {shape_text(packed)}",
    )
    return packed.select(dim, index)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """schemas.def; dense without cu_seqlens, for the operators below."""
    left, right = _window(window_size)
    return _flash_attn_forward(
        contiguous_rows(q),
        contiguous_rows(k),
        contiguous_rows(v),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        None,
        None,
        block_table,
        alibi_slopes,
        None,
        None,
        None,
        dropout_p,
        _scale(softmax_scale, q),
        causal,
        left,
        right,
        softcap,
        deterministic,
        False,
        0,
    )[0]


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    """schemas.def. (total, heads, head_dim) is one sequence."""
    if q.dim() != 3:
        return flash_attn_varlen_func(q, k, v, None, None, 0, 0, *options)
    check(
        k.dim() == 3 and v.dim() == 3,
        f"k, v: expected (seqlen_k, heads_k, head_dim) like q {shape_text(q)}, ",
        f"got {shape_text(k)} and {shape_text(v)}",
    )
    q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    return flash_attn_varlen_func(q, k, v, None, None, 0, 0, *options).squeeze(0)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *options: Any) -> Tensor:
    """schemas.def."""
    k, v = (_part(kv, "kv", 2, 2, i) for i in range(2))
    return flash_attn_varlen_func(q, k, v, None, None, 0, 0, *options)


def flash_attn_qkvpacked_func(qkv: Tensor, *options: Any) -> Tensor:
    """schemas.def."""
    q, k, v = (_part(qkv, "qkv", 2, 3, i) for i in range(3))
    return flash_attn_varlen_func(q, k, v, None, None, 0, 0, *options)


def flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, *rest: Any) -> Tensor:
    """schemas.def."""
    k, v = (_part(kv, "kv", 1, 2, i) for i in range(2))
    return flash_attn_varlen_func(q, k, v, *rest)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *options: Any
) -> Tensor:
    """schemas.def."""
    q, k, v = (_part(qkv, "qkv", 1, 3, i) for i in range(3))
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return flash_attn_varlen_func(q, k, v, *lengths, *options)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
) -> Tensor:
    """schemas.def."""
    check(num_splits <= 128, f"num_splits > 128 not supported, got {num_splits}")
    left, right = _window(window_size)
    return _flash_attn_kvcache_(
        contiguous_rows(q), k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens,
        cache_batch_idx, cache_leftpad, block_table, alibi_slopes, None, _scale(softmax_scale, q),
        causal, left, right, softcap, rotary_interleaved, False, 0,
    )[0]  # fmt: skip


def fused_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str = "gelu_tanh",
    recompute: bool = False,
) -> Tensor:
    """schemas.def; no gradient flows here, so there is nothing to recompute."""
    number = activation_number(activation)
    return mlp._fused_mlp_forward(x, weight1, bias1, weight2, bias2, number, False, 0)[0]
