"""The functions of upstream's extension fused_dense_lib: positional arguments, nothing recorded for
autograd. Matrices (batch, features), any floating dtype and device."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from flash_attn.ops.activations import gelu_bwd, gelu_fwd
from torch import Tensor

_BITS = 8


def _check(
    tensor: Tensor, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype
) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != like.device:
        raise RuntimeError(
            f"{name} must have shape {shape}, dtype {dtype} and device {like.device}, "
            f"got {tuple(tensor.shape)}, {tensor.dtype} and {tensor.device}"
        )


def _check_matrix(tensor: Tensor, name: str) -> None:
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise RuntimeError(
            f"{name}: expected a floating matrix, got {tuple(tensor.shape)} of {tensor.dtype}"
        )


def _mask_width(features: int) -> int:
    if features % _BITS:
        raise RuntimeError(
            f"weight: relu keeps one bit per feature, expected a multiple of {_BITS}, "
            f"got {features}"
        )
    return features // _BITS


def _pack(mask: Tensor) -> Tensor:
    """(batch, features) bool as (batch, features / 8) bytes, the first feature lowest."""
    bits = torch.arange(_BITS, device=mask.device)
    return (mask.view(mask.shape[0], mask.shape[1] // _BITS, _BITS) << bits).sum(
        -1, dtype=torch.uint8
    )


def _unpack(packed: Tensor) -> Tensor:
    bits = torch.arange(_BITS, device=packed.device)
    return ((packed.unsqueeze(-1) >> bits) & 1).flatten(1).bool()


@torch.no_grad()
def linear_bias_wgrad(
    input: Tensor, d_output: Tensor, has_d_bias: bool, /
) -> list[Optional[Tensor]]:
    """[d_weight, d_bias] of a linear layer; d_bias is None unless has_d_bias.

    Args:
        input: (batch, in_features).
        d_output: (batch, out_features), the gradient of the layer's result.
        has_d_bias: whether there is a bias.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
    """
    _check_matrix(input, "input")
    _check_matrix(d_output, "d_output")
    _check(d_output, "d_output", (input.shape[0], d_output.shape[1]), input, input.dtype)
    return [d_output.t() @ input, d_output.sum(0) if has_d_bias else None]


@torch.no_grad()
def linear_act_forward(
    input: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    is_gelu: bool,
    save_pre_act: bool,
    heuristic: int,
    /,
) -> list[Tensor]:
    """[output], or [output, pre_act] with save_pre_act: act(input weight^T + bias).

    Args:
        input: (batch, in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        is_gelu: gelu in its tanh approximation; false: relu.
        save_pre_act: also returns what the backward needs of act's input: for gelu all of it, for
            relu the signs, (batch, out_features / 8) uint8.
        heuristic: a hint to cuBLASLt, without effect.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
    """
    _check_matrix(input, "input")
    _check_matrix(weight, "weight")
    features = weight.shape[0]
    _check(weight, "weight", (features, input.shape[1]), input, input.dtype)
    if bias is not None:
        _check(bias, "bias", (features,), input, input.dtype)
    if save_pre_act and not is_gelu:
        _mask_width(features)
    z = F.linear(input, weight, bias)
    if not save_pre_act:
        return [gelu_fwd(z) if is_gelu else F.relu(z)]
    return [gelu_fwd(z), z] if is_gelu else [F.relu(z), _pack(z > 0)]


@torch.no_grad()
def bias_act_linear_dgrad_bgrad(
    weight: Tensor, d_output: Tensor, pre_act: Tensor, is_gelu: bool, heuristic: int, /
) -> list[Tensor]:
    """[d_input, d_bias]: from the gradient of a linear layer's result, through the activation
    before it, to that activation's input and its bias.

    Args:
        weight: (out_features, in_features) of the layer after the activation.
        d_output: (batch, out_features).
        pre_act: what linear_act_forward saved, of in_features.
        is_gelu, heuristic: as there.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
    """
    _check_matrix(weight, "weight")
    out_features, in_features = weight.shape
    batch = d_output.shape[0]
    _check(d_output, "d_output", (batch, out_features), weight, weight.dtype)
    if is_gelu:
        _check(pre_act, "pre_act", (batch, in_features), weight, weight.dtype)
    else:
        _check(pre_act, "pre_act", (batch, _mask_width(in_features)), weight, torch.uint8)
    d_activated = d_output @ weight
    if is_gelu:
        d_input = gelu_bwd(d_activated, pre_act)
    else:
        d_input = d_activated.masked_fill(~_unpack(pre_act), 0.0)
    return [d_input, d_input.sum(0)]
