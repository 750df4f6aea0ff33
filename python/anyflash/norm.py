"""anyflash.layer_norm, anyflash.rms_norm, and the general function below both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._autograd import below_autograd, is_seen, needs_autograd
from ._operators import runs_on_kernel
from ._operators.norm import DTYPE_CODES, MATH, apply_norm


class Normed(NamedTuple):
    """Results of ``dropout_add_norm``.

    Attributes:
        y: (..., columns), the normalised sum with weight and bias.
        y1: the same with weight1 and bias1; None without weight1.
        residual: the sum itself; None unless it was asked for.
        dropout_mask: bool, true where x was kept; None without dropout.
        dropout_mask1: the same for x1.
        mean: of each row of the sum, fp32 (fp64 for fp64), without gradient; None for RMS norm.
        rstd: 1 / sqrt(var + eps) of each row, or of its mean square; as mean.
    """

    y: Tensor
    y1: Tensor | None
    residual: Tensor | None
    dropout_mask: Tensor | None
    dropout_mask1: Tensor | None
    mean: Tensor | None
    rstd: Tensor


def _code(name: str, dtype: torch.dtype) -> int:
    code = DTYPE_CODES.get(dtype)
    if code is None:
        raise ValueError(f"{name}: expected fp16, bf16, fp32 or fp64, got {dtype}")
    return code


def _check_options(x: Tensor, weight: Tensor, dropout_p: float, eps: float) -> None:
    for name, tensor in (("x", x), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a number in [0, 1), got {dropout_p}")
    if not eps >= 0.0:
        raise ValueError(f"eps: expected a number that is not negative, got {eps}")


def _draw_mask(
    x: Tensor | None, dropout_p: float, generator: torch.Generator | None
) -> Tensor | None:
    """True where an element is kept."""
    if x is None or dropout_p == 0.0:
        return None
    if generator is None:  # not passed on: torch.compile takes none
        return torch.rand(x.shape, device=x.device) >= dropout_p
    return torch.rand(x.shape, generator=generator, device=x.device) >= dropout_p


def dropout_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    rowscale: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    is_rms_norm: bool = False,
    zero_centered_weight: bool = False,
    return_residual: bool = False,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Normed:
    """Layer norm or RMS norm of z = dropout(x * rowscale) + dropout(x1) + residual.

    Everything that is floating gets a gradient where it
    asks for one. fp16, bf16 and fp32 may be mixed, and are computed in fp32; fp64 stands alone.

    Args:
        x: (..., columns).
        weight: (columns,).
        bias: (columns,) or None.
        residual: x's shape, added to x; its dtype is that of the sum.
        x1: x's shape and dtype, added to x after a dropout of its own.
        weight1: (columns,) of a second norm of the same sum.
        bias1: (columns,) of the second norm.
        rowscale: a factor for each row of x, in any shape; not beside x1.
        dropout_p: the share of x and of x1 that is dropped; the rest is divided by 1 - dropout_p.
        eps: added to the variance, or to the mean square.
        is_rms_norm: z / sqrt(mean(z^2) + eps) in place of (z - mean(z)) / sqrt(var(z) + eps).
        zero_centered_weight: the factors are 1 + weight and 1 + weight1.
        return_residual: the sum z is wanted too.
        out_dtype: dtype of y; None: x's.
        residual_dtype: dtype of z where no residual is given; None: x's.
        generator: what dropout draws from; None: PyTorch's own.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
        ValueError: dropout_p outside [0, 1), a negative eps, a dtype that is not floating.
        TypeError: x or weight is not a tensor.
    """
    _check_options(x, weight, dropout_p, eps)
    mask, mask1 = (_draw_mask(tensor, dropout_p, generator) for tensor in (x, x1))
    sum_dtype = residual.dtype if residual is not None else residual_dtype or x.dtype
    sum_is_x = sum_dtype == x.dtype and all(a is None for a in (residual, x1, rowscale, mask))
    tensors = (x, residual, x1, weight, bias, weight1, bias1, rowscale)
    in_graph = is_seen()
    is_recorded = in_graph or needs_autograd(*tensors)
    on_kernel = runs_on_kernel("norm", x)
    is_stored = not sum_is_x and (return_residual or (is_recorded and on_kernel))
    args = (
        *tensors,
        mask,
        mask1,
        dropout_p,
        eps,
        is_rms_norm,
        zero_centered_weight,
        _code("x", x.dtype) if out_dtype is None else _code("out_dtype", out_dtype),
        _code("residual_dtype", sum_dtype) if is_stored else 0,
    )
    if not on_kernel:
        y, y1, z, mean, rstd = MATH["norm_forward"](*args)
    elif in_graph:
        y, y1, z, mean, rstd = torch.ops.anyflash.norm_forward.default(*args)
    elif is_recorded:
        scale_asks = rowscale is not None and rowscale.requires_grad
        y, y1, z, mean, rstd = apply_norm(*args, scale_asks)
    else:
        y, y1, z, mean, rstd = below_autograd(torch.ops.anyflash.norm_forward.default, *args)
    kept = (x if sum_is_x else z) if return_residual else None
    return Normed(
        y,
        None if weight1 is None else y1,
        kept,
        mask,
        mask1,
        None if is_rms_norm else mean.detach(),
        rstd.detach(),
    )


def norm_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """The operator norm_backward (csrc/schemas.def) where a kernel takes tensors like dy, else the
    same in PyTorch operations."""
    if runs_on_kernel("norm", dy):
        return torch.ops.anyflash.norm_backward.default(dy, *args)
    return MATH["norm_backward"](dy, *args)


def _norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    dropout_p: float,
    prenorm: bool,
    is_rms_norm: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    normed = dropout_add_norm(
        x,
        weight,
        bias,
        residual=residual,
        dropout_p=dropout_p,
        eps=eps,
        is_rms_norm=is_rms_norm,
        return_residual=prenorm,
    )
    return normed.y if normed.residual is None else (normed.y, normed.residual)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    prenorm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm of dropout(x) + residual over the last dimension (Ba et al., 2016).

    Args:
        x: (..., columns).
        weight: (columns,).
        bias: (columns,) or None.
        residual: x's shape, or None.
        eps: added to the variance.
        dropout_p: the share of x that is dropped.
        prenorm: the sum is wanted too, for the next residual.

    Returns:
        (..., columns) in x's dtype; with ``prenorm`` the sum beside it, in the residual's dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
        ValueError: dropout_p outside [0, 1), or a negative eps.
        TypeError: x or weight is not a tensor.
    """
    return _norm(x, weight, bias, residual, eps, dropout_p, prenorm, False)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    prenorm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS norm of dropout(x) + residual over the last dimension (Zhang and Sennrich, 2019).

    Arguments, results and errors are those of ``layer_norm``; eps is added to the mean square.
    """
    return _norm(x, weight, bias, residual, eps, dropout_p, prenorm, True)
