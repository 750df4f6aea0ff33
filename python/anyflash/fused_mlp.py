"""anyflash.fused_mlp and anyflash.bias_activation."""

# ruff: noqa: UP045  (torch.jit.script evaluates the annotations, also on Python 3.9)
from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from . import _autocast, backends
from ._activations import activation_number
from ._operators import mlp
from ._operators.mlp import BiasActivationCall, FusedMLPCall


@torch.jit.unused
def _fused_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Optional[Tensor],
    weight2: Tensor,
    bias2: Optional[Tensor],
    activation: str,
    recompute: bool,
    backend: Optional[str],
) -> Tensor:
    for name, tensor in (("x", x), ("weight1", weight1), ("weight2", weight2)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    number, code = activation_number(activation), backends.resolve(backend)
    if _autocast.is_enabled(x):
        x, weight1, bias1, weight2, bias2 = _autocast.cast(x, weight1, bias1, weight2, bias2)
    return mlp.fused_mlp(
        FusedMLPCall(
            x=x, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2, activation=number,
            save_hidden=not recompute, backend=code,
        )
    )  # fmt: skip


def fused_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Optional[Tensor],
    weight2: Tensor,
    bias2: Optional[Tensor],
    activation: str = "gelu_tanh",
    recompute: bool = False,
    backend: Optional[str] = None,
) -> Tensor:
    """act(x weight1^T + bias1) weight2^T + bias2.

    Args:
        x: (..., in).
        weight1: (hidden, in); for "silu_gate" (2 hidden, in), the second half being the gate.
        bias1: (hidden,), for "silu_gate" (2 hidden,); or None.
        weight2: (out, hidden).
        bias2: (out,) or None.
        activation: "gelu_tanh", "gelu_erf", "relu", "squared_relu" or "silu_gate".
        recompute: the backward computes the hidden features again instead of keeping them.
        backend: comma list of back ends to try for this call.

    Returns:
        (..., out) in x's dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
        ValueError: an unknown activation or back end.
        TypeError: x or a weight is not a tensor.
    """
    if torch.jit.is_scripting():
        return torch.ops.anyflash.fused_mlp(
            x, weight1, bias1, weight2, bias2, activation, recompute
        )
    return _fused_mlp(x, weight1, bias1, weight2, bias2, activation, recompute, backend)


def bias_activation(
    x: Tensor,
    bias: Optional[Tensor] = None,
    *,
    activation: str,
    backend: Optional[str] = None,
) -> Tensor:
    """act(x + bias).

    Args:
        x: (..., columns).
        bias: (columns,) or None.
        activation: as in fused_mlp; "silu_gate" gives u * silu(g) for (u, g) = halves of the last
            dimension.
        backend: comma list of back ends to try for this call.

    Returns:
        (..., columns), for "silu_gate" (..., columns / 2), in x's dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
        ValueError: an unknown activation or back end.
        TypeError: x is not a tensor.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    number, code = activation_number(activation), backends.resolve(backend)
    if _autocast.is_enabled(x):
        x, bias = _autocast.cast(x, bias)
    return mlp.bias_activation(BiasActivationCall(x=x, bias=bias, activation=number, backend=code))
