"""The functions of flash-attn's compiled module: its positional arguments, buffers from the caller.

They run on every device, take any head dim up to 512 and any page size, and record nothing for
autograd. Shapes are those of ``anyflash.attention``; None is allowed where an argument is Optional.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from anyflash import backends
from anyflash._autograd import below_autograd
from anyflash._numbers import integer
from anyflash._rng_state import draw_rng_state
from anyflash.attention_probs import effective_dropout, signed_probabilities, softmax_d

_ops = torch.ops.anyflash


class _Lengths(NamedTuple):
    """The operators' arguments for packed sequences, in their order; as it is for dense ones."""

    cu_seqlens_q: Optional[Tensor] = None
    cu_seqlens_k: Optional[Tensor] = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    seqused_k: Optional[Tensor] = None
    leftpad_k: Optional[Tensor] = None


def _deliver(name: str, given: Optional[Tensor], value: Tensor) -> Tensor:
    """The value in the caller's buffer, whatever its strides; without a buffer the value itself."""
    if given is None:
        return value
    if given.shape != value.shape or given.dtype != value.dtype or given.device != value.device:
        raise RuntimeError(
            f"{name} must have shape {tuple(value.shape)}, dtype {value.dtype} and device "
            f"{value.device}, got {tuple(given.shape)}, {given.dtype} and {given.device}"
        )
    return given.copy_(value)


@torch.no_grad()
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Optional[Tensor],
    lengths: _Lengths,
    block_table: Optional[Tensor],
    alibi_slopes: Optional[Tensor],
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window: tuple[int, int],
    softcap: float,
    return_softmax: bool,
    gen: Optional[torch.Generator],
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state] of both forwards."""
    if return_softmax and not p_dropout > 0.0:
        raise RuntimeError(
            f"return_softmax is only supported when p_dropout > 0.0, got p_dropout {p_dropout}"
        )
    dropout_p = effective_dropout(p_dropout)
    drawn = draw_rng_state(q.device, gen) if dropout_p > 0.0 and gen is not None else None
    result, lse, rng_state = below_autograd(
        _ops._flash_attn_forward.default,
        q, k, v, *lengths, block_table, alibi_slopes, None, None, drawn, dropout_p, softmax_scale,
        is_causal, *window, softcap, False, True, backends.current_code(),
    )  # fmt: skip
    if return_softmax:
        pattern = signed_probabilities(
            q, k, **lengths._asdict(), block_table=block_table, alibi_slopes=alibi_slopes,
            rng_state=rng_state if dropout_p > 0.0 else None, dropout_p=dropout_p,
            softmax_scale=softmax_scale, causal=is_causal, window_size=window, softcap=softcap,
        )  # fmt: skip
    else:
        pattern = q.new_empty(0)
    if not dropout_p > 0.0:
        rng_state = torch.zeros(2, dtype=torch.int64, device=q.device)
    return [_deliver("out", out, result), lse, pattern, rng_state]


@torch.no_grad()
def _differentiate(
    tensors: tuple[Tensor, ...],
    buffers: tuple[Optional[Tensor], ...],
    lengths: _Lengths,
    alibi_slopes: Optional[Tensor],
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window: tuple[int, int],
    softcap: float,
    deterministic: bool,
    rng_state: Optional[Tensor],
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d] of both backwards; tensors are dout, q, k, v, out, softmax_lse."""
    dropout_p = effective_dropout(p_dropout)
    gradients = below_autograd(
        _ops._flash_attn_backward.default,
        *tensors, None, *lengths, alibi_slopes, None, None,
        rng_state if dropout_p > 0.0 else None, dropout_p, softmax_scale, is_causal, *window,
        softcap, deterministic, False, False, backends.current_code(),
    )  # fmt: skip
    named = zip(("dq", "dk", "dv"), buffers, gradients)
    sums = softmax_d(tensors[0], tensors[4], lengths.cu_seqlens_q)
    return [*(_deliver(name, given, value) for name, given, value in named), sums]


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Optional[Tensor],
    alibi_slopes: Optional[Tensor],
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen: Optional[torch.Generator],
    /,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state] of dense attention, out in the given buffer.

    S_dmask is empty without return_softmax, else anyflash.attention_probs.signed_probabilities.
    rng_state (2,) int64 is what bwd needs to draw the same dropout; zeros without dropout.
    """
    return _attend(
        q, k, v, out, _Lengths(), None, alibi_slopes, p_dropout, softmax_scale, is_causal,
        (window_size_left, window_size_right), softcap, return_softmax, gen,
    )  # fmt: skip


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Optional[Tensor],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Optional[Tensor],
    leftpad_k: Optional[Tensor],
    block_table: Optional[Tensor],
    alibi_slopes: Optional[Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen: Optional[torch.Generator],
    num_splits: int = 0,
    /,
) -> list[Tensor]:
    """fwd for packed sequences.

    zero_tensors has no effect: rows that belong to no sequence are 0 always. Neither has
    num_splits, which 2.8.4 added.
    """
    lengths = _Lengths(
        cu_seqlens_q, cu_seqlens_k, integer("max_seqlen_q", max_seqlen_q),
        integer("max_seqlen_k", max_seqlen_k), seqused_k, leftpad_k,
    )  # fmt: skip
    return _attend(
        q, k, v, out, lengths, block_table, alibi_slopes, p_dropout, softmax_scale, is_causal,
        (window_size_left, window_size_right), softcap, return_softmax, gen,
    )  # fmt: skip


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Optional[Tensor],
    dk: Optional[Tensor],
    dv: Optional[Tensor],
    alibi_slopes: Optional[Tensor],
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen: Optional[torch.Generator],
    rng_state: Optional[Tensor],
    /,
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d]: the given buffers where there are some, maybe slices of one tensor.

    The gradients follow from the given out and softmax_lse, which may be merged from several calls.
    gen is not used: dropout repeats from rng_state.
    """
    return _differentiate(
        (dout, q, k, v, out, softmax_lse), (dq, dk, dv), _Lengths(), alibi_slopes, p_dropout,
        softmax_scale, is_causal, (window_size_left, window_size_right), softcap, deterministic,
        rng_state,
    )  # fmt: skip


def varlen_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Optional[Tensor],
    dk: Optional[Tensor],
    dv: Optional[Tensor],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Optional[Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen: Optional[torch.Generator],
    rng_state: Optional[Tensor],
    /,
) -> list[Tensor]:
    """bwd for packed sequences. zero_tensors has no effect: rows of no sequence are 0 always."""
    lengths = _Lengths(
        cu_seqlens_q,
        cu_seqlens_k,
        integer("max_seqlen_q", max_seqlen_q),
        integer("max_seqlen_k", max_seqlen_k),
    )
    return _differentiate(
        (dout, q, k, v, out, softmax_lse), (dq, dk, dv), lengths, alibi_slopes, p_dropout,
        softmax_scale, is_causal, (window_size_left, window_size_right), softcap, deterministic,
        rng_state,
    )  # fmt: skip


@torch.no_grad()
def fwd_kvcache(
    q: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    k: Optional[Tensor],
    v: Optional[Tensor],
    seqlens_k: Optional[Tensor],
    rotary_cos: Optional[Tensor],
    rotary_sin: Optional[Tensor],
    cache_batch_idx: Optional[Tensor],
    leftpad_k: Optional[Tensor],
    block_table: Optional[Tensor],
    alibi_slopes: Optional[Tensor],
    out: Optional[Tensor],
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    is_rotary_interleaved: bool,
    num_splits: int,
    /,
) -> list[Tensor]:
    """[out, softmax_lse]: appends k and v to the caches in place, then attends over them."""
    check_num_splits(num_splits)
    result, lse = below_autograd(
        _ops._flash_attn_kvcache_.default,
        q, kcache, vcache, k, v, rotary_cos, rotary_sin, seqlens_k, cache_batch_idx, leftpad_k,
        block_table, alibi_slopes, None, softmax_scale, is_causal, window_size_left,
        window_size_right, softcap, is_rotary_interleaved, True, backends.current_code(),
    )  # fmt: skip
    return [_deliver("out", out, result), lse]


def check_num_splits(num_splits: int) -> None:
    """A hint that shows in rounding only; upstream refuses numbers above 128."""
    if num_splits > 128:
        raise RuntimeError(f"num_splits > 128 not supported, got {num_splits}")
