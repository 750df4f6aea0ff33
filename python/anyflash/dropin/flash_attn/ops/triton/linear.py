"""A linear layer with its activation, and the gradient on the way back through both."""

from __future__ import annotations

from typing import Any, Optional

import torch.nn.functional as F
from torch import Tensor

from flash_attn._missing import absent
from flash_attn.ops._fused_functions import check_linear
from flash_attn.ops.triton.k_activations import (  # noqa: F401  (upstream's module has these names)
    gelu,
    gelu_approx,
    gelu_approx_grad,
    gelu_grad,
    get_triton_activation_bwd_kernel,
    get_triton_activation_kernel,
    squared_relu,
    squared_relu_grad,
)

_IDENTITY = "id"


def triton_linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    activation: str = _IDENTITY,
    save_act_input: bool = False,
) -> Any:
    """activation(x weight^T + bias), differentiable.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        activation: "id" or one of k_activations.Activation.
        save_act_input: also returns the activation's input.

    Returns:
        (..., out_features), or that and the activation's input.

    Raises:
        ValueError: an unknown activation; shapes, dtypes or devices that do not fit together.
    """
    act = None if activation == _IDENTITY else get_triton_activation_kernel(activation)
    check_linear(x, weight, bias)
    act_input = F.linear(x, weight, bias)
    out = act_input if act is None else act(act_input)
    return (out, act_input) if save_act_input else out


def triton_dgrad_act(
    grad_output: Tensor,
    weight: Tensor,
    activation: str = _IDENTITY,
    act_input: Optional[Tensor] = None,
) -> Tensor:
    """(grad_output weight) * activation'(act_input): from a layer's result to the input of the
    activation before it.

    Args:
        grad_output: (..., out_features).
        weight: (out_features, in_features).
        activation: as in triton_linear_act.
        act_input: (..., in_features); not read for "id".

    Returns:
        (..., in_features).

    Raises:
        ValueError: an unknown activation, none of its input; shapes, dtypes or devices that do not
            fit together.
    """
    derivative = None if activation == _IDENTITY else get_triton_activation_bwd_kernel(activation)
    check_linear(grad_output, weight.t(), None)
    gradient = grad_output @ weight
    if derivative is None:
        return gradient
    if act_input is None or act_input.shape != gradient.shape:
        got = None if act_input is None else tuple(act_input.shape)
        raise ValueError(f"act_input: expected {tuple(gradient.shape)} for {activation}, got {got}")
    return gradient * derivative(act_input)


__getattr__ = absent(
    __name__,
    dict.fromkeys(
        ("kernel_fwd", "kernel_bwd", "get_configs_io_bound", "init_to_zero"),
        "a Triton kernel, or a part of its tuning; triton_linear_act and triton_dgrad_act compute "
        "it on every device",
    ),
)
