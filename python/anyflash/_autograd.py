"""Gradients: one autograd.Function for each pair of operators, and a short cut into it."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from ._guards import BelowAutograd

_ops = torch.ops.anyflash


def _is_compiling() -> Callable[[], bool]:
    compiler = getattr(torch, "compiler", None)  # torch 2.1
    return getattr(compiler, "is_compiling", None) or (lambda: False)


#: True while torch.compile or torch.export traces.
is_compiling = _is_compiling()


def in_plain_eager() -> bool:
    """Neither compiling nor inside a functorch transform: a tensor is what it says, its values can
    be read and overwritten."""
    active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
    return not is_compiling() and not active()


def has_readable_values(tensor: Tensor) -> bool:
    """Whether a check may read the tensor's values: it waits for no device and guards no graph."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and in_plain_eager()


def _distinct(args: tuple[Any, ...]) -> list[Any]:
    """Repeated tensors as views of themselves: torch.compile refuses the same tensor twice."""
    result: list[Any] = []
    for arg in args:
        repeated = False
        if isinstance(arg, Tensor):
            for other in result:
                repeated = repeated or other is arg
        result.append(arg.view_as(arg) if repeated else arg)
    return result


_kernel = threading.local()


@contextlib.contextmanager
def inside_kernel() -> Iterator[None]:
    """Says that an autograd kernel is at work: functorch has prepared the call already."""
    before = getattr(_kernel, "active", False)
    _kernel.active = True
    try:
        yield
    finally:
        _kernel.active = before


def _single_level(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` for inside an autograd kernel that a functorch transform called."""
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.function import _SingleLevelFunction

    def forward(ctx: Any, *args: Any) -> Any:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    single = type(function.__name__, (_SingleLevelFunction,), members)

    def apply(*args: Any) -> Any:
        with enable_single_level_autograd_function():
            return single.apply(*args)

    return apply


def applier(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` for eager mode, without what it does for functorch (30 of 40 us).

    The short cut is private to torch, so it is taken only where torch has it.
    """
    try:
        direct = torch._C._FunctionBase.__dict__["apply"].__get__(None, function)
        transforms_active = torch._C._are_functorch_transforms_active
    except (AttributeError, KeyError):
        return function.apply

    def apply(*args: Any) -> Any:
        if is_compiling():
            return function.apply(*_distinct(args))
        if not transforms_active():
            return direct(*args)
        if not getattr(_kernel, "active", False):
            return function.apply(*args)
        return _single_level(function)(*args)

    return apply


class _RefuseFunction(Function):
    """Gradients unchanged, bound to what they were computed from, and an error for whoever
    differentiates them: (number of gradients, *gradients, *inputs)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        raise RuntimeError("anyflash has no second derivative, but a gradient was differentiated")


def first_derivative_only(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """torch's once_differentiable, which also refuses where the incoming gradient is a constant.

    A gradient penalty on a plain sum would otherwise silently do nothing.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if is_compiling():
            return results
        tensors = [gradient for gradient in results if gradient is not None]
        causes = [x for x in (*gradients, *ctx.saved_tensors) if x is not None]
        bound = iter(_RefuseFunction.apply(len(tensors), *tensors, *causes))
        return tuple(None if gradient is None else next(bound) for gradient in results)

    return checked


def needs_autograd(*tensors: Tensor | None) -> bool:
    """True where a call is to be recorded, or, under forward-mode differentiation, refused by the
    Function."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return forward_ad._current_level >= 0


def below_autograd(operator: Callable[..., Any], *args: Any) -> Any:
    """Calls an operator whose call nobody records past its autograd kernel, which costs
    microseconds; in a graph as it is."""
    if is_compiling():
        return operator(*args)
    with BelowAutograd():
        return operator(*args)


class AttentionFunction(Function):
    """attention_forward and attention_backward. Arguments: those of the forward operator without
    ``block_table``, then ``deterministic``, ``lse_requires_grad``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        seqused_k: Tensor | None,
        leftpad_k: Tensor | None,
        alibi_slopes: Tensor | None,
        bias: Tensor | None,
        sinks: Tensor | None,
        rng_state: Tensor | None,
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
    @first_derivative_only
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
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


class ForwardOnlyFunction(Function):
    """An operator that has no derivative: (its name, what to tell who asks for one, *arguments).

    The results are bound to the arguments, so that a backward raises instead of leaving gradients
    out.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, why: str, *arguments: Any) -> Any:
        return getattr(_ops, name).default(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.why = inputs[1]
        ctx.sizes = tuple(x.shape if isinstance(x, Tensor) else None for x in inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        gradient = next((x for x in gradients if x is not None), None)
        if gradient is None:  # nothing went through the results
            return (None,) * len(ctx.sizes)
        return tuple(
            _ops.refuse_gradient.default(gradient, size, ctx.why) if needed else None
            for size, needed in zip(ctx.sizes, ctx.needs_input_grad)
        )


class BiasActivationFunction(Function):
    """bias_activation and its backward: (x, bias, activation, backend)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, activation: int, backend: int) -> Tensor:
        return _ops.bias_activation.default(x, bias, activation, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.options = inputs[2:]

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, bias = ctx.saved_tensors
        dx, dbias = _ops.bias_activation_backward.default(dy, x, bias, *ctx.options)
        return dx, None if bias is None else dbias, None, None


class FusedMLPFunction(Function):
    """fused_mlp_forward and its backward: (x, weight1, bias1, weight2, bias2, activation,
    save_hidden, backend)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
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
    @first_derivative_only
    def backward(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Any, ...]:
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
apply_forward_only = applier(ForwardOnlyFunction)
apply_bias_activation = applier(BiasActivationFunction)
apply_fused_mlp = applier(FusedMLPFunction)
