"""The arguments of norm_forward and norm_backward as the core sees them, and what it refuses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _records
from . import can_check, check, expect, record_of

#: dtype -> its number in the schemas, kernels/launch.h's Dtype.
DTYPE_CODES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 4, torch.float64: 8}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}

_FORWARD_TENSORS = (
    "x", "residual", "x1", "weight", "bias", "weight1", "bias1", "rowscale", "dropout_mask",
    "dropout_mask1",
)  # fmt: skip
_FORWARD_OPTIONS = (
    "dropout_p", "eps", "is_rms_norm", "zero_centered_weight", "out_dtype", "residual_dtype",
)  # fmt: skip
_GRADIENT_TENSORS = ("dy", "dy1", "dresidual_out", "z", "mean", "rstd")
_SHARED_TENSORS = (*_FORWARD_TENSORS[3:], "x")
_SHARED_OPTIONS = ("dropout_p", "is_rms_norm", "zero_centered_weight")
_GRADIENT_OPTIONS = ("has_residual", "has_x1", "x_dtype")


def has_own_dresidual(has_residual: bool, masked: bool, scaled: bool, same_dtype: bool) -> bool:
    """Whether the residual's gradient differs from dx; else the operator returns dx for both."""
    return has_residual and (masked or scaled or not same_dtype)


def forward_record(*args: Any) -> _records.NormCall:
    """Of the arguments of norm_forward."""
    tensors = dict(zip(_FORWARD_TENSORS, args))
    return record_of(_records.NormCall, tensors, **dict(zip(_FORWARD_OPTIONS, args[10:])))


def backward_records(*args: Any) -> tuple[Any, Any]:
    """Of the arguments of norm_backward: NormCall, NormGradient."""
    call = record_of(
        _records.NormCall,
        dict(zip(_SHARED_TENSORS, args[6:14])),
        **dict(zip(_SHARED_OPTIONS, args[14:17])),
    )
    gradient = record_of(
        _records.NormGradient,
        dict(zip(_GRADIENT_TENSORS, args[:6])),
        **dict(zip(_GRADIENT_OPTIONS, args[17:20])),
    )
    return call, gradient


def _expect_shared(x: Tensor, tensors: dict[str, Tensor | None]) -> None:
    expect(x.dtype in DTYPE_CODES and x.dim() > 0 and x.shape[-1] > 0, "x", x)
    for name in ("weight", "bias", "weight1", "bias1"):
        vector = tensors[name]
        expect(vector is None or vector.shape == x.shape[-1:], name, vector, x)
    expect(tensors["bias1"] is None or tensors["weight1"] is not None, "bias1")
    for name, tensor in tensors.items():
        is_other = tensor is not None and (tensor.dtype == torch.float64) != (
            x.dtype == torch.float64
        )
        expect(name.startswith("dropout_mask") or not is_other, f"{name}'s dtype", tensor)


def _expect_like(name: str, tensor: Tensor | None, x: Tensor) -> None:
    expect(tensor is None or tensor.shape == x.shape, name, tensor, x)


def check_forward(*args: Any) -> None:
    """Raises RuntimeError for arguments of norm_forward that do not fit together."""
    if can_check(*args):
        check("norm", forward_record(*args), None)
        return
    tensors = dict(zip(_FORWARD_TENSORS, args))
    x = tensors["x"]
    _expect_shared(x, tensors)
    for name in ("residual", "x1", "dropout_mask", "dropout_mask1"):
        _expect_like(name, tensors[name], x)
    codes = [code for code in args[14:16] if code != 0]
    is_fp64 = x.dtype == torch.float64
    expect(
        all(code in DTYPES and (code == 8) == is_fp64 for code in codes),
        "out_dtype and residual_dtype",
    )


def check_backward(*args: Any) -> None:
    """Raises RuntimeError for arguments of norm_backward that do not fit together."""
    if can_check(*args):
        check("norm", *backward_records(*args))
        return
    gradients = dict(zip(_GRADIENT_TENSORS, args))
    shared = dict(zip(_SHARED_TENSORS, args[6:14]))
    z = gradients["z"]
    _expect_shared(z, shared)
    for name in ("dy", "dy1", "dresidual_out"):
        _expect_like(name, gradients[name], z)
    for name in ("dropout_mask", "dropout_mask1", "x"):
        _expect_like(name, shared[name], z)
