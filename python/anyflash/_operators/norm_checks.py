"""What norm_forward and norm_backward refuse, with the words of csrc/rowwise/norm.cpp."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CODES = (1, 2, 4, 8)


def _refuse(text: str) -> NoReturn:
    raise RuntimeError(text)


def _name(dtype: torch.dtype) -> str:
    from .._python_ops.arguments import DTYPE_NAMES

    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def _check_dtype(name: str, dtype: torch.dtype, x: Tensor) -> None:
    """fp16, bf16 and fp32 mix; fp64 does not mix with them."""
    if dtype not in _FLOATING or (dtype == torch.float64) != (x.dtype == torch.float64):
        wanted = "fp64" if x.dtype == torch.float64 else "fp16, bf16 or fp32"
        _refuse(f"{name}: expected {wanted} beside x of {_name(x.dtype)}, got {_name(dtype)}")


def _check_code(name: str, code: int) -> None:
    if code not in _CODES:
        _refuse(f"{name}: expected 1 (fp16), 2 (bf16), 4 (fp32) or 8 (fp64), got {code}")


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        _refuse(f"{name}: expected {x.device} like x, got {tensor.device}")


def _check_like(name: str, tensor: Tensor | None, x: Tensor) -> None:
    """A floating tensor of x's shape."""
    if tensor is None:
        return
    if tensor.shape != x.shape:
        _refuse(f"{name}: expected x's shape {tuple(x.shape)}, got {tuple(tensor.shape)}")
    _check_dtype(name, tensor.dtype, x)
    _check_device(name, tensor, x)


def _check_same_dtype(name: str, tensor: Tensor | None, dtype: torch.dtype, of: str) -> None:
    if tensor is not None and tensor.dtype != dtype:
        _refuse(f"{name}: expected {of}'s dtype {_name(dtype)}, got {_name(tensor.dtype)}")


def _check_vector(name: str, vector: Tensor | None, x: Tensor) -> None:
    if vector is None:
        return
    if vector.dim() != 1 or vector.shape[0] != x.shape[-1]:
        _refuse(f"{name}: expected ({x.shape[-1]},), x's last dimension, got {tuple(vector.shape)}")
    _check_dtype(name, vector.dtype, x)
    _check_device(name, vector, x)


def _check_per_row(name: str, tensor: Tensor | None, x: Tensor) -> None:
    if tensor is None:
        return
    rows = x.shape[:-1].numel()
    if tensor.numel() != rows:
        _refuse(
            f"{name}: expected {rows} numbers, one per row of x {tuple(x.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    _check_dtype(name, tensor.dtype, x)
    _check_device(name, tensor, x)


def _check_mask(name: str, mask: Tensor | None, x: Tensor) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        _refuse(f"{name}: expected bool, got {_name(mask.dtype)}")
    if mask.shape != x.shape:
        _refuse(f"{name}: expected x's shape {tuple(x.shape)}, got {tuple(mask.shape)}")
    _check_device(name, mask, x)


def _check_shared(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    rowscale: Tensor | None,
    dropout_mask: Tensor | None,
    dropout_mask1: Tensor | None,
    dropout_p: float,
    has_x1: bool,
) -> None:
    """What both directions take, ``x`` being a tensor like x."""
    if x.dtype not in _FLOATING:
        _refuse(f"x: expected fp16, bf16, fp32 or fp64, got {_name(x.dtype)}")
    if x.dim() < 1 or x.shape[-1] < 1:
        _refuse(f"x: expected (..., columns) with at least one column, got {tuple(x.shape)}")
    vectors = {"weight": weight, "bias": bias, "weight1": weight1, "bias1": bias1}
    for name, vector in vectors.items():
        _check_vector(name, vector, x)
    if bias1 is not None and weight1 is None:
        _refuse("bias1: expected weight1 with it, got bias1 alone")
    if rowscale is not None and has_x1:
        _refuse("rowscale is not supported with parallel LayerNorm: expected none beside x1")
    _check_per_row("rowscale", rowscale, x)
    _check_mask("dropout_mask", dropout_mask, x)
    _check_mask("dropout_mask1", dropout_mask1, x)
    if (dropout_mask1 is not None) != (has_x1 and dropout_mask is not None):
        _refuse(
            "dropout_mask1: expected one where there are x1 and dropout_mask, and else none, got "
            + ("none" if dropout_mask1 is None else "one")
        )
    if not 0 <= dropout_p < 1:
        _refuse(f"dropout_p: expected a number in [0, 1), got {dropout_p:g}")


def check_forward(
    x: Tensor,
    residual: Tensor | None,
    x1: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    rowscale: Tensor | None,
    dropout_mask: Tensor | None,
    dropout_mask1: Tensor | None,
    dropout_p: float,
    out_dtype: int,
    residual_dtype: int,
) -> None:
    """Raises RuntimeError for arguments of norm_forward that do not fit together."""
    _check_shared(
        x, weight, bias, weight1, bias1, rowscale, dropout_mask, dropout_mask1, dropout_p,
        x1 is not None,
    )  # fmt: skip
    _check_like("residual", residual, x)
    _check_like("x1", x1, x)
    _check_same_dtype("x1", x1, x.dtype, "x")
    _check_code("out_dtype", out_dtype)
    if residual_dtype != 0:
        _check_code("residual_dtype", residual_dtype)
    for name, code in (("out_dtype", out_dtype), ("residual_dtype", residual_dtype)):
        if code != 0:
            _check_dtype(name, _FLOATING[_CODES.index(code)], x)
    if residual is not None and residual_dtype != 0:
        _check_same_dtype(
            "residual", residual, _FLOATING[_CODES.index(residual_dtype)], "residual_out"
        )


def check_backward(
    dy: Tensor,
    dy1: Tensor | None,
    dresidual_out: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    rowscale: Tensor | None,
    dropout_mask: Tensor | None,
    dropout_mask1: Tensor | None,
    x: Tensor | None,
    dropout_p: float,
    is_rms_norm: bool,
    has_x1: bool,
    x_dtype: int,
) -> None:
    """Raises RuntimeError for arguments of norm_backward that do not fit together."""
    _check_shared(
        z, weight, bias, weight1, bias1, rowscale, dropout_mask, dropout_mask1, dropout_p, has_x1
    )
    for name, tensor in (("dy", dy), ("dy1", dy1), ("dresidual_out", dresidual_out)):
        _check_like(name, tensor, z)
    _check_same_dtype("dy1", dy1, dy.dtype, "dy")
    _check_same_dtype("dresidual_out", dresidual_out, z.dtype, "z")
    if dy1 is not None and weight1 is None:
        _refuse("dy1: expected weight1 with it, got dy1 alone")
    statistics = torch.float64 if z.dtype == torch.float64 else torch.float32
    for name, tensor in (("rstd", rstd), *(() if is_rms_norm else (("mean", mean),))):
        _check_per_row(name, tensor, z)
        _check_same_dtype(name, tensor, statistics, "the statistics")
    _check_code("x_dtype", x_dtype)
    dtype = _FLOATING[_CODES.index(x_dtype)]
    _check_dtype("x_dtype", dtype, z)
    if rowscale is not None:
        _check_like("x", x, z)
        _check_same_dtype("x", x, dtype, "dx")
