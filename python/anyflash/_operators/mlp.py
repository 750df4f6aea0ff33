"""act(x + bias) and the fused MLP: their fakes, and their derivatives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from .._activations import inputs_per_output
from .._autograd import (
    applier,
    below_autograd,
    call_operator,
    first_derivative_only,
    is_seen,
    needs_autograd,
)

_ops = torch.ops.anyflash


class BiasActivationCall(NamedTuple):
    """What _bias_activation_forward is called with, in its order."""

    x: Tensor
    bias: Tensor | None
    activation: int
    backend: int


class FusedMLPCall(NamedTuple):
    """What _fused_mlp_forward is called with, in its order."""

    x: Tensor
    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None
    activation: int
    save_hidden: bool
    backend: int


# ---- The fakes.


def _bias_activation_fake(x: Tensor, bias: Tensor | None, activation: int, backend: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // inputs_per_output(activation)))


def _bias_activation_backward_fake(
    dy: Tensor, x: Tensor, bias: Tensor | None, activation: int, backend: int
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, x.new_empty(0 if bias is None else bias.shape)


def _fused_mlp_fake(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    call = FusedMLPCall(*arguments, **named)
    x, rows = call.x, call.x.shape[:-1]
    hidden = x.new_empty((*rows, call.weight1.shape[0]) if call.save_hidden else 0)
    return x.new_empty((*rows, call.weight2.shape[0])), hidden


def _fused_mlp_backward_fake(
    dout: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    hidden: Tensor,
    bias2_requires_grad: bool,
    activation: int,
    backend: int,
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape),
        x.new_empty(weight1.shape),
        x.new_empty(0 if bias1 is None else bias1.shape),
        x.new_empty(weight2.shape),
        x.new_empty(weight2.shape[0] if bias2_requires_grad else 0),
    )


FAKES = {
    "_bias_activation_forward": _bias_activation_fake,
    "_bias_activation_backward": _bias_activation_backward_fake,
    "_fused_mlp_forward": _fused_mlp_fake,
    "_fused_mlp_backward": _fused_mlp_backward_fake,
}


# ---- The derivatives.


class BiasActivationFunction(Function):
    """_bias_activation_forward on its arguments."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return below_autograd(_ops._bias_activation_forward.default, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        call = BiasActivationCall(*inputs)
        ctx.save_for_backward(call.x, call.bias)
        ctx.options = (call.activation, call.backend)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        backward = _ops._bias_activation_backward.default
        dx, dbias = below_autograd(backward, dy, x, bias, *ctx.options)
        gradients = {"x": dx, "bias": None if bias is None else dbias}
        return tuple(map(gradients.get, BiasActivationCall._fields))


class FusedMLPFunction(Function):
    """_fused_mlp_forward on its arguments; hidden is not differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return below_autograd(_ops._fused_mlp_forward.default, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        call, hidden = FusedMLPCall(*inputs), output[1]
        ctx.save_for_backward(call.x, call.weight1, call.bias1, call.weight2, hidden)
        ctx.has_bias2 = call.bias2 is not None
        ctx.options = (call.activation, call.backend)
        ctx.mark_non_differentiable(hidden)
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * len(FusedMLPCall._fields)
        x, weight1, bias1, weight2, hidden = ctx.saved_tensors
        dx, dweight1, dbias1, dweight2, dbias2 = below_autograd(
            _ops._fused_mlp_backward.default,
            dout, x, weight1, bias1, weight2, hidden, ctx.has_bias2, *ctx.options,
        )  # fmt: skip
        gradients = {"x": dx, "weight1": dweight1, "weight2": dweight2}
        if bias1 is not None:
            gradients["bias1"] = dbias1
        if ctx.has_bias2:
            gradients["bias2"] = dbias2
        return tuple(map(gradients.get, FusedMLPCall._fields))


_apply_bias_activation = applier(BiasActivationFunction)
_apply_fused_mlp = applier(FusedMLPFunction)
DIFFERENTIABLE = {
    "_bias_activation_forward": _apply_bias_activation,
    "_fused_mlp_forward": _apply_fused_mlp,
}


def bias_activation(call: BiasActivationCall) -> Tensor:
    """The operator for a public function's call."""
    operator = _ops._bias_activation_forward.default
    return call_operator(operator, _apply_bias_activation, call, call.x, call.bias)


def fused_mlp(call: FusedMLPCall) -> Tensor:
    """out of the operator for a public function's call. hidden isn't kept where no backward can
    come, which a graph does not know."""
    tensors = (call.x, call.weight1, call.bias1, call.weight2, call.bias2)
    if call.save_hidden and not (is_seen() or needs_autograd(*tensors)):
        call = call._replace(save_hidden=False)
    return call_operator(_ops._fused_mlp_forward.default, _apply_fused_mlp, call, *tensors)[0]
