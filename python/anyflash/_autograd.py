"""Gradients: one autograd.Function for each pair of operators, and a short cut into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

_ops = torch.ops.anyflash


def _is_tracing() -> Callable[[], bool]:
    """Tells whether torch.compile traces or a functorch transform is at work."""
    compiler = getattr(torch, "compiler", None)
    is_compiling = getattr(compiler, "is_compiling", None) or (lambda: False)
    transforms_active = torch._C._are_functorch_transforms_active
    return lambda: is_compiling() or transforms_active()


def applier(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` for eager mode, without what it does for tracers and transforms (30 of 40 microseconds).

    The short cut is private to torch, so it is taken only where torch has it.
    """
    try:
        direct = torch._C._FunctionBase.__dict__["apply"].__get__(None, function)
        is_tracing = _is_tracing()
    except (AttributeError, KeyError):
        return function.apply

    def apply(*args: Any) -> Any:
        return function.apply(*args) if is_tracing() else direct(*args)

    return apply


class AttentionFunction(Function):
    """attention_forward and attention_backward. Arguments: those of the forward operator without
    ``block_table``, then ``deterministic``, ``lse_requires_grad``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Optional[Tensor],
        cu_seqlens_k: Optional[Tensor],
        max_seqlen_q: int,
        max_seqlen_k: int,
        seqused_k: Optional[Tensor],
        leftpad_k: Optional[Tensor],
        alibi_slopes: Optional[Tensor],
        bias: Optional[Tensor],
        sinks: Optional[Tensor],
        rng_state: Optional[Tensor],
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_left: int,
        window_right: int,
        softcap: float,
        backend: int,
        deterministic: bool,
        lse_requires_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        return _ops.attention_forward.default(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, leftpad_k,
            None, alibi_slopes, bias, sinks, rng_state, dropout_p, softmax_scale, causal,
            window_left, window_right, softcap, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        out, lse = output
        tensors = (*inputs[:5], *inputs[7:13])
        ctx.save_for_backward(*tensors, out, lse)
        ctx.max_seqlens = inputs[5:7]
        ctx.options = inputs[13:20]
        ctx.deterministic = inputs[20]
        ctx.lse_requires_grad = inputs[21]
        ctx.set_materialize_grads(False)
        if not ctx.lse_requires_grad:
            ctx.mark_non_differentiable(lse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Optional[Tensor], dlse: Optional[Tensor]) -> tuple[Any, ...]:
        (q, k, v, cu_q, cu_k, seqused_k, leftpad_k, alibi, bias, sinks, rng, out, lse) = (
            ctx.saved_tensors
        )
        if not ctx.lse_requires_grad:
            dlse = None
        if dout is None:
            dout = torch.zeros_like(out)
        *options, backend = ctx.options
        needs_bias, needs_sinks = ctx.needs_input_grad[10], ctx.needs_input_grad[11]
        dq, dk, dv, dbias, dsinks = _ops.attention_backward.default(
            dout, q, k, v, out, lse, dlse, cu_q, cu_k, *ctx.max_seqlens, seqused_k, leftpad_k,
            alibi, bias, sinks, rng, *options, ctx.deterministic, needs_bias, needs_sinks, backend,
        )  # fmt: skip
        unused = (None,) * 7
        by_bias = (dbias if needs_bias else None, dsinks if needs_sinks else None)
        return (dq, dk, dv, *unused, *by_bias, *(None,) * 10)


class BiasActivationFunction(Function):
    """bias_activation and its backward: (x, bias, activation, backend)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Optional[Tensor], activation: int, backend: int) -> Tensor:
        return _ops.bias_activation.default(x, bias, activation, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.options = inputs[2:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, bias = ctx.saved_tensors
        dx, dbias = _ops.bias_activation_backward.default(dy, x, bias, *ctx.options)
        return dx, None if bias is None else dbias, None, None


class FusedMLPFunction(Function):
    """fused_mlp_forward and its backward: (x, weight1, bias1, weight2, bias2, activation, save_hidden, backend)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight1: Tensor,
        bias1: Optional[Tensor],
        weight2: Tensor,
        bias2: Optional[Tensor],
        activation: int,
        save_hidden: bool,
        backend: int,
    ) -> tuple[Tensor, Tensor]:
        return _ops.fused_mlp_forward.default(
            x, weight1, bias1, weight2, bias2, activation, save_hidden, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight1, bias1, weight2, bias2, activation, _, backend = inputs
        hidden = output[1]
        ctx.save_for_backward(x, weight1, bias1, weight2, hidden)
        ctx.has_bias2 = bias2 is not None
        ctx.options = (activation, backend)
        ctx.mark_non_differentiable(hidden)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Optional[Tensor], _: Any) -> tuple[Any, ...]:
        x, weight1, bias1, weight2, hidden = ctx.saved_tensors
        if dout is None:
            return (None,) * 8
        dx, dweight1, dbias1, dweight2, dbias2 = _ops.fused_mlp_backward.default(
            dout, x, weight1, bias1, weight2, hidden, ctx.has_bias2, *ctx.options
        )
        return (
            dx,
            dweight1,
            None if bias1 is None else dbias1,
            dweight2,
            dbias2 if ctx.has_bias2 else None,
            None,
            None,
            None,
        )


apply_attention = applier(AttentionFunction)
apply_bias_activation = applier(BiasActivationFunction)
apply_fused_mlp = applier(FusedMLPFunction)
