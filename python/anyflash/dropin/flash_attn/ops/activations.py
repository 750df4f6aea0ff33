"""Activations and their gradients, for every device and dtype.

gelu is its tanh approximation. Sixteen-bit tensors are computed in fp32 and rounded once, where
upstream rounds after every step. Everything can be differentiated, twice too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflash._autograd import wants_operations


def gelu_fwd(x: Tensor) -> Tensor:
    """gelu(x), of x's shape and dtype."""
    return F.gelu(x, approximate="tanh")


def gelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """The gradient of gelu_fwd's input x for the gradient g of its result, in x's dtype."""
    common = torch.promote_types(g.dtype, x.dtype)
    return torch.ops.aten.gelu_backward(g.to(common), x.to(common), approximate="tanh").to(x.dtype)


def bias_gelu(y: Tensor, bias: Tensor) -> Tensor:
    """gelu(y + bias), in y's dtype. y (..., columns), bias (columns,)."""
    return gelu_fwd(bias + y).to(y.dtype)


def bias_gelu_back(g: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of y, gradient of bias) for the gradient g of bias_gelu's result."""
    dy = gelu_bwd(g, bias + y)
    return dy.to(y.dtype), dy.sum(tuple(range(dy.dim() - 1)), dtype=bias.dtype)


def relu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """g where x >= 0, else 0, in x's dtype. At 0 torch's own gradient is 0."""
    return torch.where(x >= 0, g, 0.0).to(x.dtype)


def sqrelu_fwd(x: Tensor) -> Tensor:
    """relu(x) squared, of x's shape and dtype."""
    return F.relu(x).square()


def sqrelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """The gradient of sqrelu_fwd's input x for the gradient g of its result, in x's dtype."""
    return (2.0 * g * F.relu(x)).to(x.dtype)


def _check_gated(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    (_, x), *others = tensors.items()
    for name, other in others:
        if any(a != b and 1 not in (a, b) for a, b in zip(x.shape[::-1], other.shape[::-1])):
            raise ValueError(
                f"{name}: expected a shape that broadcasts with x {tuple(x.shape)}, got "
                f"{tuple(other.shape)}"
            )


def _widened(*tensors: Tensor) -> tuple[list[Tensor], torch.dtype]:
    """The tensors in one dtype, fp32 at the least, and the dtype of a result."""
    dtype = tensors[0].dtype
    for other in tensors[1:]:
        dtype = torch.promote_types(dtype, other.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return [tensor.to(wide) for tensor in tensors], dtype


def swiglu_fwd(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) * y: x is the gate.

    Raises:
        ValueError: x or y is not floating; shapes that do not fit together.
    """
    _check_gated(x=x, y=y)
    (x, y), dtype = _widened(x, y)
    return (F.silu(x) * y).to(dtype)


def swiglu_bwd(x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of x, gradient of y) for the gradient g of swiglu_fwd's result.

    Raises:
        ValueError: as swiglu_fwd.
    """
    _check_gated(x=x, y=y, g=g)
    (x, y, g), dtype = _widened(x, y, g)
    sigmoid = x.sigmoid()  # torch's silu_backward has no derivative
    dx = g * y * sigmoid * (1.0 + x * (1.0 - sigmoid))
    return dx.to(dtype), (g * x * sigmoid).to(dtype)


class GeLUFunction(torch.autograd.Function):
    """bias_gelu with its gradient, which upstream's lacks: (input, bias)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(input, bias)
        return bias_gelu(input, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        return bias_gelu_back(grad_output, *ctx.saved_tensors)


class FastGeLUFunction(torch.autograd.Function):
    """gelu_fwd with its gradient: (input)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return gelu_fwd(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return gelu_bwd(grad_output, *ctx.saved_tensors)


class SwiGLUFunction(torch.autograd.Function):
    """swiglu_fwd with its gradient: (x, y)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return swiglu_fwd(x, y)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return swiglu_bwd(x, y, dout)


bias_gelu_impl = GeLUFunction.apply
fast_gelu_impl = FastGeLUFunction.apply


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) * y; errors as swiglu_fwd."""
    return swiglu_fwd(x, y) if wants_operations() else SwiGLUFunction.apply(x, y)
