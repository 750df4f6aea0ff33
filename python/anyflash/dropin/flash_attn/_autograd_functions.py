"""The autograd.Functions of upstream's public functions, for clients that call them by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anyflash import _numbers

from . import _private_ops


class _Options(NamedTuple):
    """What a forward hands to its backward."""

    dropout_p: float
    softmax_scale: float
    causal: bool
    window_left: int
    window_right: int
    softcap: float
    alibi_slopes: Optional[Tensor]
    deterministic: bool


def _forward(
    ctx: Any,
    qkv: tuple[Tensor, ...],
    lengths: tuple[Any, ...],
    dropout_p: float,
    softmax_scale: Optional[float],
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Optional[Tensor],
    deterministic: bool,
    return_softmax: bool,
    block_table: Optional[Tensor] = None,
) -> Any:
    """out or (out, softmax_lse, S_dmask); lengths: cu_seqlens, max_seqlens or nothing."""
    q, k, v = qkv
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    left, right = _numbers.window(window_size)
    options = _Options(dropout_p, scale, causal, left, right, softcap, alibi_slopes, deterministic)
    arguments = (*lengths, *options[:-1], return_softmax and dropout_p > 0)
    if lengths:
        results = _private_ops.varlen_forward(q, k, v, *(*arguments, block_table))
    else:
        results = _private_ops.forward(q, k, v, *arguments)
    out, softmax_lse, s_dmask, rng_state = results
    ctx.save_for_backward(q, k, v, out, softmax_lse, rng_state, *lengths[:2])
    ctx.max_seqlens = lengths[2:]
    ctx.options = options
    return (out, softmax_lse, s_dmask) if return_softmax else out


def _backward(ctx: Any, dout: Tensor, buffers: tuple[Tensor, ...]) -> None:
    """Writes the gradients of q, k and v."""
    q, k, v, out, softmax_lse, rng_state, *cu_seqlens = ctx.saved_tensors
    lengths = (*cu_seqlens, *ctx.max_seqlens)
    run: Callable[..., Tensor] = _private_ops.varlen_backward if lengths else _private_ops.backward
    run(dout, q, k, v, out, softmax_lse, *buffers, *lengths, *ctx.options, rng_state)


def _packed_like(tensor: Tensor, parts: int) -> Tensor:
    """Room for the gradients of such tensors side by side: (..., parts, heads, head_dim)."""
    return tensor.new_empty((*tensor.shape[:-2], parts, *tensor.shape[-2:]))


def _separate_backward(ctx: Any, dout: Tensor, others: int) -> tuple[Any, ...]:
    dq, dk, dv = (torch.empty_like(x) for x in ctx.saved_tensors[:3])
    _backward(ctx, dout, (dq, dk, dv))
    return (dq, dk, dv, *(None,) * others)


def _kvpacked_backward(ctx: Any, dout: Tensor, others: int) -> tuple[Any, ...]:
    q, k = ctx.saved_tensors[:2]
    dq, dkv = torch.empty_like(q), _packed_like(k, 2)
    _backward(ctx, dout, (dq, *dkv.unbind(-3)))
    return (dq, dkv, *(None,) * others)


def _qkvpacked_backward(ctx: Any, dout: Tensor, others: int) -> tuple[Any, ...]:
    dqkv = _packed_like(ctx.saved_tensors[0], 3)
    _backward(ctx, dout, dqkv.unbind(-3))
    return (dqkv, *(None,) * others)


class FlashAttnFunc(torch.autograd.Function):
    """Dense attention of q, k, v."""

    @staticmethod
    def forward(
        ctx, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_softmax, is_grad_enabled=True,
    ):  # fmt: skip
        return _forward(
            ctx, (q, k, v), (), dropout_p, softmax_scale, causal, window_size, softcap,
            alibi_slopes, deterministic, return_softmax,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *args):
        return _separate_backward(ctx, dout, 9)


class FlashAttnKVPackedFunc(torch.autograd.Function):
    """Dense attention of q and kv (batch, seqlen_k, 2, heads_k, head_dim)."""

    @staticmethod
    def forward(
        ctx, q, kv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_softmax, is_grad_enabled=True,
    ):  # fmt: skip
        return _forward(
            ctx, (q, *kv.unbind(-3)), (), dropout_p, softmax_scale, causal, window_size, softcap,
            alibi_slopes, deterministic, return_softmax,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *args):
        return _kvpacked_backward(ctx, dout, 9)


class FlashAttnQKVPackedFunc(torch.autograd.Function):
    """Dense attention of qkv (batch, seqlen, 3, heads, head_dim)."""

    @staticmethod
    def forward(
        ctx, qkv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_softmax, is_grad_enabled=True,
    ):  # fmt: skip
        return _forward(
            ctx, qkv.unbind(-3), (), dropout_p, softmax_scale, causal, window_size, softcap,
            alibi_slopes, deterministic, return_softmax,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *args):
        return _qkvpacked_backward(ctx, dout, 9)


class FlashAttnVarlenFunc(torch.autograd.Function):
    """Packed attention of q, k, v; forward only with block_table."""

    @staticmethod
    def forward(
        ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_softmax,
        block_table, is_grad_enabled=True,
    ):  # fmt: skip
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return _forward(
            ctx, (q, k, v), lengths, dropout_p, softmax_scale, causal, window_size, softcap,
            alibi_slopes, deterministic, return_softmax, block_table,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *args):
        return _separate_backward(ctx, dout, 14)


class FlashAttnVarlenKVPackedFunc(torch.autograd.Function):
    """Packed attention of q and kv (total_k, 2, heads_k, head_dim)."""

    @staticmethod
    def forward(
        ctx, q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_softmax,
        is_grad_enabled=True,
    ):  # fmt: skip
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return _forward(
            ctx, (q, *kv.unbind(-3)), lengths, dropout_p, softmax_scale, causal, window_size,
            softcap, alibi_slopes, deterministic, return_softmax,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *args):
        return _kvpacked_backward(ctx, dout, 13)


class FlashAttnVarlenQKVPackedFunc(torch.autograd.Function):
    """Packed attention of qkv (total, 3, heads, head_dim)."""

    @staticmethod
    def forward(
        ctx, qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_softmax, is_grad_enabled=True,
    ):  # fmt: skip
        lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return _forward(
            ctx, qkv.unbind(-3), lengths, dropout_p, softmax_scale, causal, window_size, softcap,
            alibi_slopes, deterministic, return_softmax,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *args):
        return _qkvpacked_backward(ctx, dout, 11)
