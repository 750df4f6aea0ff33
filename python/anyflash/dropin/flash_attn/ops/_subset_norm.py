"""What ops.layer_norm, ops.rms_norm and the extension dropout_layer_norm share: the norm of a sum,
with a factor per column, of some rows, into some rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflash._autograd import is_compiling
from anyflash.norm import Normed, dropout_add_norm


def _check_subset(name: str, subset: Tensor, rows: int, of: str, x0: Tensor) -> None:
    if subset.dtype not in (torch.int32, torch.int64) or subset.device != x0.device:
        raise RuntimeError(
            f"{name}: expected int32 or int64 on {x0.device}, got {subset.dtype} on {subset.device}"
        )
    if x0.device.type != "cpu" or is_compiling() or subset.numel() == 0:
        return  # reading values would wait for the device
    low, high = int(subset.min()), int(subset.max())
    if low < 0 or high > rows:
        raise RuntimeError(
            f"{name}: expected 0 (none) to {rows}, the rows of {of} counted from 1, "
            f"got {low if low < 0 else high}"
        )


def take_rows(x: Tensor, subset: Tensor) -> Tensor:
    """Row i is x's row subset[i], counted from 1, and zero for 0."""
    return F.pad(x, (0, 0, 1, 0)).index_select(0, subset.reshape(-1).long())


def put_rows(x: Tensor, subset: Tensor, rows: int) -> Tensor:
    """x's row i as row subset[i] of ``rows``, counted from 1; 0: nowhere. The others are zero."""
    whole = x.new_zeros((rows + 1, x.shape[-1]))
    return whole.index_copy(0, subset.reshape(-1).long(), x)[1:]


def check_subsets(
    x0: Tensor, x0_numrows: int, x0_subset: Tensor | None, out_subset: Tensor | None, out_rows: int
) -> None:
    """Both index x0_numrows and out_rows rows, one of each per row of the sum.

    Raises:
        RuntimeError: they do not.
    """
    if (x0_subset is None) != (out_subset is None):
        missing = "x0_subset" if x0_subset is None else "out_subset"
        raise RuntimeError(f"{missing}: expected x0_subset and out_subset or neither, got None")
    if x0_subset is None or out_subset is None:
        return
    if x0_subset.numel() != out_subset.numel():
        raise RuntimeError(
            f"out_subset: expected {x0_subset.numel()} numbers as x0_subset has, "
            f"got {out_subset.numel()}"
        )
    _check_subset("x0_subset", x0_subset, x0_numrows, "x0", x0)
    _check_subset("out_subset", out_subset, out_rows, "the output", x0)


def scaled_columns(x0: Tensor, colscale: Tensor | None) -> Tensor:
    """x0 times a factor per column, unrounded.

    Raises:
        RuntimeError: not one factor per column.
    """
    if colscale is None:
        return x0
    if colscale.shape != x0.shape[-1:]:
        raise RuntimeError(
            f"layerscale: expected ({x0.shape[-1]},), x0's last dimension, "
            f"got {tuple(colscale.shape)}"
        )
    return x0.to(torch.promote_types(x0.dtype, torch.float32)) * colscale


def normalise(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    eps: float,
    *,
    rowscale: Tensor | None = None,
    colscale: Tensor | None = None,
    x0_subset: Tensor | None = None,
    out_subset: Tensor | None = None,
    rowscale_const: float = 1.0,
    out_numrows: int = 0,
    residual_in_fp32: bool = False,
    **options: Any,
) -> Normed:
    """dropout_add_norm of x0 * rowscale * colscale.

    Args:
        x0: (..., columns); with subsets (x0_numrows, columns).
        colscale: (columns,), a factor per column, after dropout.
        x0_subset: (rows,), the row of x0 that each row of the sum takes, counted from 1; 0: none.
        out_subset: (rows,), the row of y that each row of the sum makes, counted from 1; 0: none.
        rowscale_const: with subsets, a factor of all rows.
        out_numrows: with subsets, the rows of y; those that no row makes are zero.
        residual_in_fp32: the sum is fp32 where no residual is given.
        options: of dropout_add_norm.

    Raises:
        RuntimeError: shapes, dtypes, devices or indices that do not fit together.
        ValueError: dropout_p outside [0, 1), a negative eps.
    """
    check_subsets(x0, x0.shape[0], x0_subset, out_subset, out_numrows)
    x = scaled_columns(x0, colscale)
    if x0_subset is not None:
        x = take_rows(x, x0_subset)
        if rowscale_const != 1.0:
            rowscale = torch.full(x.shape[:-1], rowscale_const, device=x.device)
    normed = dropout_add_norm(
        x,
        weight,
        bias,
        residual=residual,
        rowscale=rowscale,
        dropout_p=dropout_p,
        eps=eps,
        out_dtype=x0.dtype,
        residual_dtype=torch.float32 if residual_in_fp32 else x0.dtype,
        **options,
    )
    if x0_subset is None or out_subset is None:
        return normed
    mask = normed.dropout_mask
    return normed._replace(
        y=put_rows(normed.y, out_subset, out_numrows),
        dropout_mask=None if mask is None else put_rows(mask, x0_subset, x0.shape[0]),
    )
