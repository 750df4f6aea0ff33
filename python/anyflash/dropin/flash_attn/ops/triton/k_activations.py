"""Upstream's Triton activations as functions of tensors, and their derivatives ``*_grad(x)``."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn.ops.activations import gelu_bwd, gelu_fwd, sqrelu_fwd

_sqrt2pi = math.sqrt(2.0 / math.pi)
_sqrt1_2 = math.sqrt(0.5)
_gaussian_pdf_normalization = 1.0 / math.sqrt(2.0 * math.pi)
_LEAK = 0.01


class Activation(str, Enum):
    """Names of the activations."""

    SquaredReLU = "squared_relu"
    GeLU = "gelu"
    GeLUApprox = "gelu_approx"
    LeakyReLU = "leaky_relu"
    ReLU = "relu"


tanh = torch.tanh
cosh = torch.cosh


def relu(x: Tensor) -> Tensor:
    """x where x >= 0, else 0."""
    return F.relu(x)


def relu_grad(x: Tensor) -> Tensor:
    """1 where x >= 0, else 0."""
    return (x >= 0).to(x.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x) squared (Primer, arXiv 2109.08668)."""
    return sqrelu_fwd(x)


def squared_relu_grad(x: Tensor) -> Tensor:
    """2 relu(x)."""
    return 2.0 * F.relu(x)


def leaky_relu(x: Tensor) -> Tensor:
    """x where x >= 0, else 0.01 x."""
    return F.leaky_relu(x, _LEAK)


def leaky_relu_grad(x: Tensor) -> Tensor:
    """1 where x >= 0, else 0.01."""
    return torch.full_like(x, _LEAK).masked_fill(x >= 0, 1.0)


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution function (arXiv 1606.08415)."""
    return F.gelu(x)


def gelu_grad(x: Tensor) -> Tensor:
    """The derivative of gelu."""
    return torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate="none")


def gelu_approx(x: Tensor) -> Tensor:
    """gelu in its tanh approximation."""
    return gelu_fwd(x)


def gelu_approx_grad(x: Tensor) -> Tensor:
    """The derivative of gelu_approx."""
    return gelu_bwd(torch.ones_like(x), x)


_FUNCTIONS = {
    Activation.ReLU: (relu, relu_grad),
    Activation.LeakyReLU: (leaky_relu, leaky_relu_grad),
    Activation.GeLU: (gelu, gelu_grad),
    Activation.GeLUApprox: (gelu_approx, gelu_approx_grad),
    Activation.SquaredReLU: (squared_relu, squared_relu_grad),
}
Function = Callable[[Tensor], Tensor]


def _functions(activation: Union[Activation, str]) -> tuple[Function, Function]:
    try:
        return _FUNCTIONS[Activation(activation)]
    except ValueError:
        names = ", ".join(name.value for name in Activation)
        raise ValueError(f"activation: expected one of {names}, got {activation!r}") from None


def get_triton_activation_kernel(activation: Union[Activation, str, None]) -> Optional[Function]:
    """The function of tensors; None for None.

    Raises:
        ValueError: an unknown activation.
    """
    return _functions(activation)[0] if activation else None


def get_triton_activation_bwd_kernel(
    activation: Union[Activation, str, None],
) -> Optional[Function]:
    """The derivative, a function of the activation's input; None for None.

    Raises:
        ValueError: an unknown activation.
    """
    return _functions(activation)[1] if activation else None
