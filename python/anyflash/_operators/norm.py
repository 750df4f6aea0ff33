"""Layer norm and RMS norm of a sum: norm_forward and norm_backward.

    z  = dropout(x * rowscale) + dropout(x1) + residual         (whatever of it there is)
    y  = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias     RMS norm: z / sqrt(mean(z^2) + eps)
    y1 = the same with weight1 and bias1

Statistics are fp32 (fp64 for fp64 tensors), and y is computed from z before z is rounded to the
dtype of residual_out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from .._autograd import applier, below_autograd, first_derivative_only
from . import norm_kernel, statistics_dtype
from .norm_arguments import (
    DTYPE_CODES,
    DTYPES,
    check_backward,
    check_forward,
    has_own_dresidual,
)


def _column(x: Tensor, dtype: torch.dtype, rows: torch.Size) -> Tensor:
    return x.to(dtype).reshape(rows).unsqueeze(-1)


def _dropped(x: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    return x if mask is None else torch.where(mask, x * (1 / (1 - dropout_p)), 0.0)


def _scale(weight: Tensor, dtype: torch.dtype, zero_centered: bool) -> Tensor:
    return weight.to(dtype) + 1 if zero_centered else weight.to(dtype)


def _forward(
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
    eps: float,
    is_rms_norm: bool,
    zero_centered_weight: bool,
    out_dtype: int,
    residual_dtype: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_forward(
        x, residual, x1, weight, bias, weight1, bias1, rowscale, dropout_mask, dropout_mask1,
        dropout_p, eps, is_rms_norm, zero_centered_weight, out_dtype, residual_dtype,
    )  # fmt: skip
    dtype = statistics_dtype(x)
    z = x.to(dtype)
    if rowscale is not None:
        z = z * _column(rowscale, dtype, x.shape[:-1])
    z = _dropped(z, dropout_mask, dropout_p)
    if x1 is not None:
        z = z + _dropped(x1.to(dtype), dropout_mask1, dropout_p)
    if residual is not None:
        z = z + residual.to(dtype)
    mean = x.new_empty(0, dtype=dtype) if is_rms_norm else z.mean(-1)
    centered = z if is_rms_norm else z - mean.unsqueeze(-1)
    rstd = torch.rsqrt(centered.square().mean(-1) + eps)
    normalised = centered * rstd.unsqueeze(-1)

    def affine(weight: Tensor, bias: Tensor | None) -> Tensor:
        y = normalised * _scale(weight, dtype, zero_centered_weight)
        y = y if bias is None else y + bias.to(dtype)
        return y.to(DTYPES[out_dtype]).contiguous()

    return (
        affine(weight, bias),
        x.new_empty(0, dtype=DTYPES[out_dtype]) if weight1 is None else affine(weight1, bias1),
        z.to(DTYPES[residual_dtype], copy=z is x).contiguous()
        if residual_dtype
        else x.new_empty(0),
        mean,
        rstd,
    )


def _backward(
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
    zero_centered_weight: bool,
    has_residual: bool,
    has_x1: bool,
    x_dtype: int,
) -> tuple[Tensor, ...]:
    check_backward(
        dy, dy1, dresidual_out, z, mean, rstd, weight, bias, weight1, bias1, rowscale,
        dropout_mask, dropout_mask1, x, dropout_p, is_rms_norm, zero_centered_weight,
        has_residual, has_x1, x_dtype,
    )  # fmt: skip
    dtype, rows = statistics_dtype(z), z.shape[:-1]
    normalised = z.to(dtype)
    if not is_rms_norm:
        normalised = normalised - mean.unsqueeze(-1)
    normalised = normalised * rstd.unsqueeze(-1)

    def over_rows(products: Tensor, like: Tensor) -> Tensor:
        return products.reshape(-1, z.shape[-1]).sum(0).to(like.dtype)

    wdy, parameters = torch.zeros_like(normalised), []
    for dout, w, b in ((dy, weight, bias), (dy1, weight1, bias1)):
        dout = None if dout is None else dout.to(dtype)
        if dout is not None and w is not None:
            wdy = wdy + dout * _scale(w, dtype, zero_centered_weight)
        for parameter, factor in ((w, normalised), (b, None)):
            if parameter is None:
                parameters.append(z.new_empty(0))
            elif dout is None:
                parameters.append(torch.zeros_like(parameter))
            else:
                product = dout if factor is None else dout * factor
                parameters.append(over_rows(product, parameter))
    dz = wdy - normalised * (wdy * normalised).mean(-1, keepdim=True)
    if not is_rms_norm:
        dz = dz - wdy.mean(-1, keepdim=True)
    dz = dz * rstd.unsqueeze(-1)
    if dresidual_out is not None:
        dz = dz + dresidual_out.to(dtype)

    dx = dscaled = _dropped(dz, dropout_mask, dropout_p)
    drowscale = z.new_empty(0)
    if rowscale is not None:
        dx = dscaled * _column(rowscale, dtype, rows)
        if x is not None:
            drowscale = (dscaled * x.to(dtype)).sum(-1).reshape(rowscale.shape).to(rowscale.dtype)
    to, masked = DTYPES[x_dtype], dropout_mask is not None
    dx1 = _dropped(dz, dropout_mask1, dropout_p) if has_x1 and masked else z.new_empty(0)
    own_dresidual = has_own_dresidual(has_residual, masked, rowscale is not None, to == z.dtype)
    dresidual = dz if own_dresidual else z.new_empty(0)
    return (
        dx.to(to).contiguous(),
        dx1.to(to).contiguous(),
        dresidual.to(z.dtype).contiguous(),
        *parameters,
        drowscale,
    )


MATH: dict[str, Callable[..., Any]] = {"norm_forward": _forward, "norm_backward": _backward}
KERNELS: dict[str, Callable[..., Any]] = {
    "norm_forward": norm_kernel.forward,
    "norm_backward": norm_kernel.backward,
}


def _forward_fake(
    x: Tensor, residual: Any, x1: Any, weight: Any, bias: Any, weight1: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    *_, is_rms_norm, _, out_dtype, residual_dtype = rest
    dtype, rows = statistics_dtype(x), x.shape[:-1]

    def like_x(code: int, wanted: bool) -> Tensor:
        return x.new_empty(x.shape if wanted else 0, dtype=DTYPES.get(code))

    return (
        like_x(out_dtype, True),
        like_x(out_dtype, weight1 is not None),
        like_x(residual_dtype, residual_dtype != 0),
        x.new_empty(0 if is_rms_norm else rows, dtype=dtype),
        x.new_empty(rows, dtype=dtype),
    )


def _backward_fake(
    dy: Tensor,
    dy1: Any,
    dresidual_out: Any,
    z: Tensor,
    mean: Any,
    rstd: Any,
    weight: Tensor,
    bias: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    rowscale: Tensor | None,
    dropout_mask: Tensor | None,
    dropout_mask1: Any,
    x: Tensor | None,
    dropout_p: float,
    is_rms_norm: bool,
    zero_centered_weight: bool,
    has_residual: bool,
    has_x1: bool,
    x_dtype: int,
) -> tuple[Tensor, ...]:
    dtype, masked = DTYPES[x_dtype], dropout_mask is not None
    scaled = rowscale is not None
    own_dresidual = has_own_dresidual(has_residual, masked, scaled, dtype == z.dtype)

    def like_z(dtype: torch.dtype, wanted: bool) -> Tensor:
        return z.new_empty(z.shape if wanted else 0, dtype=dtype)

    def like(parameter: Tensor | None) -> Tensor:
        return z.new_empty(0) if parameter is None else parameter.new_empty(parameter.shape)

    return (
        like_z(dtype, True),
        like_z(dtype, has_x1 and masked),
        like_z(z.dtype, own_dresidual),
        *(like(parameter) for parameter in (weight, bias, weight1, bias1)),
        like(rowscale if x is not None else None),
    )


FAKES = {"norm_forward": _forward_fake, "norm_backward": _backward_fake}


class NormFunction(Function):
    """norm_forward and norm_backward. Arguments: those of norm_forward, then whether rowscale asks
    for a gradient. ``z`` among the results is empty where it would be x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return below_autograd(torch.ops.anyflash.norm_forward.default, *args[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, x1, *parameters = inputs[:10]
        dropout_p, _, is_rms_norm, zero_centered_weight = inputs[10:14]
        y, y1, z, mean, rstd = output
        ctx.stored = inputs[15] != 0
        scaled_x = x if inputs[16] else None
        ctx.save_for_backward(z if ctx.stored else x, mean, rstd, *parameters, scaled_x)
        ctx.options = (
            dropout_p,
            is_rms_norm,
            zero_centered_weight,
            residual is not None,
            x1 is not None,
            DTYPE_CODES[x.dtype],
        )
        constant = [mean, rstd]
        constant += [] if ctx.stored else [z]
        constant += [y1] if parameters[2] is None else []
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Any, dy1: Any, dz: Any, *_: Any) -> tuple[Any, ...]:
        z, mean, rstd, *rest = ctx.saved_tensors
        weight, bias, weight1, bias1, rowscale, _, _, x = rest
        has_residual, has_x1 = ctx.options[3:5]
        if dy is None:
            dy = torch.zeros_like(z, dtype=None if dy1 is None else dy1.dtype)
        dx, dx1, dresidual, *gradients = below_autograd(
            torch.ops.anyflash.norm_backward.default,
            dy, dy1 if weight1 is not None else None, dz if ctx.stored else None, z, mean, rstd,
            *rest, *ctx.options,
        )  # fmt: skip
        asked = (weight, bias, weight1, bias1, None if x is None else rowscale)
        parameters = (g if p is not None else None for g, p in zip(gradients, asked))
        return (
            dx,
            (dresidual if dresidual.numel() else dx) if has_residual else None,
            (dx1 if dx1.numel() else dx) if has_x1 else None,
            *parameters,
            *(None,) * 9,
        )


apply_norm = applier(NormFunction)


def _differentiable(*args: Any) -> tuple[Tensor, ...]:
    x, residual, x1, rowscale, mask = (args[i] for i in (0, 1, 2, 7, 8))
    rowscale_asks = rowscale is not None and rowscale.requires_grad
    sum_is_x = all(a is None for a in (residual, x1, rowscale, mask))
    if args[15] != 0 or sum_is_x:
        return apply_norm(*args, rowscale_asks)
    # The backward needs the sum, also where the caller doesn't.
    sum_dtype = DTYPE_CODES[(x if residual is None else residual).dtype]
    y, y1, _, mean, rstd = apply_norm(*args[:15], sum_dtype, rowscale_asks)
    return y, y1, x.new_empty(0), mean, rstd


DIFFERENTIABLE = {"norm_forward": _differentiable}
