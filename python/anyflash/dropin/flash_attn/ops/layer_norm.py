"""Layer norm after dropout and residual, as upstream's extension dropout_layer_norm computes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._missing import absent
from ._subset_norm import normalise


def maybe_align(x: Tensor, alignment_in_bytes: int = 16) -> Tensor:
    """x, copied unless its memory begins at a multiple of ``alignment_in_bytes``."""
    return x if x.data_ptr() % alignment_in_bytes == 0 else x.clone()


def _byte_mask(mask: Tensor | None, x0: Tensor) -> Tensor:
    """1 where an element was kept."""
    if mask is None:
        return torch.ones(x0.shape, dtype=torch.uint8, device=x0.device)
    return mask.view(torch.uint8)


def _dropout_add_norm(
    x0: Tensor,
    residual: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    rowscale: Tensor | None,
    colscale: Tensor | None,
    dropout_p: float,
    epsilon: float,
    residual_in_fp32: bool = False,
    prenorm: bool = False,
    is_rms_norm: bool = False,
    return_dmask: bool = False,
) -> Any:
    normed = normalise(
        x0,
        residual,
        gamma,
        beta,
        dropout_p,
        epsilon,
        rowscale=rowscale,
        colscale=colscale,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
        return_residual=prenorm,
    )
    results: list[Tensor | None] = [normed.y]
    results += [normed.residual] if prenorm else []
    results += [_byte_mask(normed.dropout_mask, x0)] if return_dmask else []
    return results[0] if len(results) == 1 else tuple(results)


def _dropout_add_norm_subset(
    x0: Tensor,
    residual: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    colscale: Tensor | None,
    x0_subset: Tensor | None,
    out_subset: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale_const: float,
    out_numrows: int,
    residual_in_fp32: bool = False,
    prenorm: bool = False,
    is_rms_norm: bool = False,
    return_dmask: bool = False,
) -> Any:
    columns, shape = x0.shape[-1], (-1, *x0.shape[1:])
    normed = normalise(
        x0.reshape(-1, columns),
        None if residual is None else residual.reshape(-1, columns),
        gamma,
        beta,
        dropout_p,
        epsilon,
        colscale=colscale,
        x0_subset=x0_subset,
        out_subset=out_subset,
        rowscale_const=rowscale_const,
        out_numrows=out_numrows,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
        return_residual=prenorm,
    )
    results = [normed.y.view(shape)]
    results += [normed.residual.view(shape)] if prenorm and normed.residual is not None else []
    results += [_byte_mask(normed.dropout_mask, x0).view(x0.shape)] if return_dmask else []
    return results[0] if len(results) == 1 else tuple(results)


def _dropout_add_norm_parallel_residual(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    gamma0: Tensor,
    beta0: Tensor | None,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    dropout_p: float,
    epsilon: float,
    residual_in_fp32: bool = False,
    prenorm: bool = False,
    is_rms_norm: bool = False,
    return_dmask: bool = False,
) -> tuple[Tensor | None, ...]:
    normed = normalise(
        x0,
        residual,
        gamma0,
        beta0,
        dropout_p,
        epsilon,
        x1=x1,
        weight1=gamma1,
        bias1=beta1,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
        return_residual=prenorm,
    )
    results = [normed.y, normed.y1]
    results += [normed.residual] if prenorm else []
    if return_dmask:
        results += [_byte_mask(mask, x0) for mask in (normed.dropout_mask, normed.dropout_mask1)]
    return tuple(results)


class DropoutAddLayerNormFn:
    """The general function under the name of upstream's autograd function."""

    apply = staticmethod(_dropout_add_norm)


class DropoutAddLayerNormSubsetFn:
    """The general function of some rows under the name of upstream's autograd function."""

    apply = staticmethod(_dropout_add_norm_subset)


class DropoutAddLayerNormParallelResidualFn:
    """The general function of two inputs under the name of upstream's autograd function."""

    apply = staticmethod(_dropout_add_norm_parallel_residual)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """Layer norm of x over its last dimension, in x's dtype."""
    return _dropout_add_norm(x, None, weight, bias, None, None, 0.0, epsilon)


def dropout_add_layer_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """Layer norm of dropout(x0 * rowscale) * layerscale + residual.

    Args:
        x0: (..., columns).
        residual: x0's shape, or None. Its dtype is that of the sum.
        weight: (columns,).
        bias: (columns,) or None.
        dropout_p: the share of x0 that is dropped.
        epsilon: added to the variance.
        rowscale: a factor for each row of x0.
        layerscale: (columns,), a factor for each column.
        prenorm: the sum is returned too.
        residual_in_fp32: the sum is fp32 where no residual is given; else it has no effect.
        return_dropout_mask: the mask is returned too, uint8, 1 where an element was kept.

    Returns:
        y in x0's dtype, then the sum, then the mask; a tuple where it is more than y.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
        ValueError: dropout_p outside [0, 1), a negative epsilon.
    """
    return _dropout_add_norm(
        x0, residual, weight, bias, rowscale, layerscale, dropout_p, epsilon, residual_in_fp32,
        prenorm, False, return_dropout_mask,
    )  # fmt: skip


def dropout_add_layer_norm_subset(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    layerscale: Tensor | None = None,
    x0_subset: Tensor | None = None,
    out_subset: Tensor | None = None,
    rowscale_const: float = 1.0,
    out_numrows: int = 0,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """dropout_add_layer_norm of some rows of x0, into some rows of y.

    Args:
        x0_subset: (rows,), the row of x0 that each row of the sum takes, counted from 1; 0: none.
        out_subset: (rows,), the row of y that each row of the sum makes, counted from 1; 0: none.
        rowscale_const: a factor of all rows of x0.
        out_numrows: rows of y. Those that no row makes are zero.
    """
    return _dropout_add_norm_subset(
        x0, residual, weight, bias, layerscale, x0_subset, out_subset, dropout_p, epsilon,
        rowscale_const, out_numrows, residual_in_fp32, prenorm, False, return_dropout_mask,
    )  # fmt: skip


def dropout_add_layer_norm_parallel_residual(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    epsilon: float,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> tuple[Tensor | None, ...]:
    """Two layer norms of dropout(x0) + dropout(x1) + residual.

    Returns:
        (y0, y1), y1 being None without weight1; then the sum with prenorm; then both masks, uint8,
        with return_dropout_mask.
    """
    return _dropout_add_norm_parallel_residual(
        x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon, residual_in_fp32,
        prenorm, False, return_dropout_mask,
    )  # fmt: skip


class DropoutAddLayerNorm(nn.Module):
    """dropout_add_layer_norm with weights of its own.

    Args:
        hidden_size: columns.
        prenorm: forward returns (y, sum).
        p: the share that is dropped in training.
        eps: added to the variance.
        residual_in_fp32: the sum is fp32 where no residual is given.
        device: of the weights.
        dtype: of the weights.
    """

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.p = p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """weight 1, bias 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Any:
        """y, or (y, sum) with prenorm."""
        return dropout_add_layer_norm(
            x0,
            residual,
            self.weight,
            self.bias,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )


__getattr__ = absent(
    __name__,
    {
        f"_{function}_{direction}": (
            f"a call of upstream's compiled module; {function} computes it on every device, and "
            "autograd its gradient"
        )
        for function in (
            "dropout_add_layer_norm",
            "dropout_add_layer_norm_subset",
            "dropout_add_layer_norm_parallel_residual",
        )
        for direction in ("forward", "backward")
    },
)
