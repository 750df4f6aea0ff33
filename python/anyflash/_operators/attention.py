"""Attention: _flash_attn_forward and _flash_attn_backward. Both providers bring the kernels; the
fakes, the derivative and the way from the public functions to the operator are here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from .._autograd import (
    applier,
    below_autograd,
    call_operator,
    first_derivative_only,
    is_exporting,
    is_seen,
    refuse_gradient,
)
from . import known_names

_ops = torch.ops.anyflash
_PAGED = (
    "block_table: paged attention has no gradient, but a backward went through its result; "
    "expected a call under torch.no_grad(), or keys and values without pages"
)
_ALIBI = (
    "alibi_slopes: attention has no gradient of the slopes, but they require one; expected "
    "alibi_slopes.detach(), or bias = slopes * distances, which has a gradient"
)


class AttentionCall(NamedTuple):
    """What _flash_attn_forward is called with, in its order. Meaning: schemas.def."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    seqused_k: Tensor | None
    leftpad_k: Tensor | None
    block_table: Tensor | None
    alibi_slopes: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    rng_state: Tensor | None
    dropout_p: float
    softmax_scale: float
    causal: bool
    window_size_left: int
    window_size_right: int
    softcap: float
    deterministic: bool
    backend: int


class BackwardCall(NamedTuple):
    """What _flash_attn_backward is called with, in its order."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    softmax_lse: Tensor
    dsoftmax_lse: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    seqused_k: Tensor | None
    leftpad_k: Tensor | None
    alibi_slopes: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    rng_state: Tensor | None
    dropout_p: float
    softmax_scale: float
    causal: bool
    window_size_left: int
    window_size_right: int
    softcap: float
    deterministic: bool
    bias_requires_grad: bool
    sinks_requires_grad: bool
    backend: int


# ---- The fakes.


def lse_like(q: Tensor, packed: bool) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(shape, dtype=dtype)


def out_like(q: Tensor, v: Tensor) -> Tensor:
    if v.shape[-1] == q.shape[-1]:
        return torch.empty_like(q)
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _forward_fake(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = AttentionCall(*arguments, **named)
    q = call.q
    rng_state = q.new_empty(2 if call.dropout_p > 0.0 else 0, dtype=torch.int64)
    return out_like(q, call.v), lse_like(q, call.cu_seqlens_q is not None), rng_state


def _backward_fake(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
    call = BackwardCall(*arguments, **named)

    def like(x: Tensor | None, wanted: bool) -> Tensor:
        return torch.empty_like(x) if x is not None and wanted else call.q.new_empty(0)

    return (
        *(torch.empty_like(x) for x in (call.q, call.k, call.v)),
        like(call.bias, call.bias_requires_grad),
        like(call.sinks, call.sinks_requires_grad),
    )


FAKES = {"_flash_attn_forward": _forward_fake, "_flash_attn_backward": _backward_fake}


# ---- The derivative.


class Saved(NamedTuple):
    """The tensors that a backward needs; rng_state is the one of the forward's results."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seqused_k: Tensor | None
    leftpad_k: Tensor | None
    block_table: Tensor | None
    alibi_slopes: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    out: Tensor
    softmax_lse: Tensor
    rng_state: Tensor


class _Numbers(NamedTuple):
    """The other arguments of the forward that its backward takes."""

    max_seqlen_q: int
    max_seqlen_k: int
    dropout_p: float
    softmax_scale: float
    causal: bool
    window_size_left: int
    window_size_right: int
    softcap: float
    deterministic: bool
    backend: int


def remember(
    ctx: Any, call: AttentionCall, out: Tensor, softmax_lse: Tensor, rng_state: Tensor
) -> None:
    """Keeps in a Function's context what ``differentiate`` needs."""
    saved = Saved(
        q=call.q, k=call.k, v=call.v, cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_k, seqused_k=call.seqused_k, leftpad_k=call.leftpad_k,
        block_table=call.block_table, alibi_slopes=call.alibi_slopes, bias=call.bias,
        sinks=call.sinks, out=out, softmax_lse=softmax_lse, rng_state=rng_state,
    )  # fmt: skip
    ctx.save_for_backward(*saved)
    ctx.numbers = _Numbers(
        max_seqlen_q=call.max_seqlen_q, max_seqlen_k=call.max_seqlen_k, dropout_p=call.dropout_p,
        softmax_scale=call.softmax_scale, causal=call.causal,
        window_size_left=call.window_size_left, window_size_right=call.window_size_right,
        softcap=call.softcap, deterministic=call.deterministic, backend=call.backend,
    )  # fmt: skip
    ctx.set_materialize_grads(False)


def differentiate(
    ctx: Any, dout: Tensor | None, dsoftmax_lse: Tensor | None, wanted: Mapping[str, bool]
) -> dict[str, Tensor]:
    """The gradients of the arguments whose names are wanted; a refusal where there is none."""
    saved, numbers = Saved(*ctx.saved_tensors), ctx.numbers
    if dout is None:
        dout = torch.zeros_like(saved.out)
    if saved.block_table is not None:
        return {
            name: refuse_gradient(dout, getattr(saved, name), _PAGED)
            for name in ("q", "k", "v", "alibi_slopes", "bias", "sinks")
            if wanted.get(name)
        }
    wants_bias, wants_sinks = wanted.get("bias", False), wanted.get("sinks", False)
    call = BackwardCall(
        dout=dout, q=saved.q, k=saved.k, v=saved.v, out=saved.out, softmax_lse=saved.softmax_lse,
        dsoftmax_lse=dsoftmax_lse, cu_seqlens_q=saved.cu_seqlens_q,
        cu_seqlens_k=saved.cu_seqlens_k, max_seqlen_q=numbers.max_seqlen_q,
        max_seqlen_k=numbers.max_seqlen_k, seqused_k=saved.seqused_k, leftpad_k=saved.leftpad_k,
        alibi_slopes=saved.alibi_slopes, bias=saved.bias, sinks=saved.sinks,
        rng_state=saved.rng_state if numbers.dropout_p > 0.0 else None,
        dropout_p=numbers.dropout_p, softmax_scale=numbers.softmax_scale, causal=numbers.causal,
        window_size_left=numbers.window_size_left, window_size_right=numbers.window_size_right,
        softcap=numbers.softcap, deterministic=numbers.deterministic,
        bias_requires_grad=wants_bias, sinks_requires_grad=wants_sinks, backend=numbers.backend,
    )  # fmt: skip
    dq, dk, dv, dbias, dsinks = below_autograd(_ops._flash_attn_backward.default, *call)
    gradients = {"q": dq, "k": dk, "v": dv}
    if wants_bias:
        gradients["bias"] = dbias
    if wants_sinks:
        gradients["sinks"] = dsinks
    if wanted.get("alibi_slopes"):
        assert saved.alibi_slopes is not None
        gradients["alibi_slopes"] = refuse_gradient(dout, saved.alibi_slopes, _ALIBI)
    return gradients


class AttentionFunction(Function):
    """_flash_attn_forward on its arguments; out and softmax_lse are differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return below_autograd(_ops._flash_attn_forward.default, *arguments)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        remember(ctx, AttentionCall(*inputs), *output)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    @first_derivative_only
    def backward(
        ctx: Any, dout: Tensor | None, dsoftmax_lse: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        wanted = dict(zip(AttentionCall._fields, ctx.needs_input_grad))
        gradients = differentiate(ctx, dout, dsoftmax_lse, wanted)
        return tuple(map(gradients.get, AttentionCall._fields))


apply_attention = applier(AttentionFunction)
DIFFERENTIABLE = {"_flash_attn_forward": apply_attention}


def _has_known_name(call: AttentionCall) -> bool:
    """Whether the call is to go by the original library's operators: they can say it, and trainers
    may look at it. What is written to a file has operators that C++ programs have too."""
    if is_exporting() or torch._C._get_tracing_state() is not None:
        return False
    if call.cu_seqlens_q is None and not (
        call.seqused_k is None and call.leftpad_k is None and call.block_table is None
    ):
        return False
    unknown = (call.bias, call.sinks, call.rng_state)
    is_plain = not call.deterministic and call.backend == 0
    return is_plain and all(x is None for x in unknown) and known_names.are_ours()


def _by_known_name(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """The call through the operator that trainers know."""
    qkv = (call.q, call.k, call.v)
    options = (
        call.dropout_p, call.softmax_scale, call.causal, call.window_size_left,
        call.window_size_right, call.softcap, call.alibi_slopes, False,
    )  # fmt: skip
    names = torch.ops.flash_attn
    if call.cu_seqlens_q is None:
        results = names._flash_attn_forward.default(*qkv, *options)
    else:
        results = names._flash_attn_varlen_forward.default(
            *qkv, call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k,
            *options, call.block_table, call.leftpad_k, call.seqused_k,
        )  # fmt: skip
    out, softmax_lse, _, rng_state = results
    return out, softmax_lse, rng_state


def attend(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """(out, softmax_lse, rng_state) of a public function's call."""
    if is_seen() and _has_known_name(call):
        return _by_known_name(call)
    return call_operator(
        _ops._flash_attn_forward.default, apply_attention, call,
        call.q, call.k, call.v, call.bias, call.sinks, call.alibi_slopes,
    )  # fmt: skip
