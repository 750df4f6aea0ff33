"""norm_forward and norm_backward by the core: results are allocated, what no kernel reads is
converted."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .. import _core, _records, _threads
from .norm_arguments import DTYPES, backward_records, forward_record, has_own_dresidual

_NUMBERS = ("weight", "bias", "weight1", "bias1", "rowscale")


class _Converted:
    """Makes the views what a kernel reads; keeps the copies that it takes."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def put_matrices(self, record: ctypes.Structure, **tensors: Tensor | None) -> None:
        for name, x in tensors.items():
            if x is not None:
                self._put(record, name, _core.as_matrix(x))

    def put_numbers(self, record: ctypes.Structure, **tensors: Tensor | None) -> None:
        for name, x in tensors.items():
            if x is not None:
                self._put(record, name, x.float().contiguous())

    def _put(self, record: ctypes.Structure, name: str, x: Tensor) -> None:
        self._kept.append(x)
        _records.put(record, name, x)


def _results(**tensors: Tensor) -> Any:
    results = _records.new(_records.NormResults)
    for name, x in tensors.items():
        _records.put(results, name, x)
    return results


def forward(
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
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """schemas.def."""
    parameters = (weight, bias, weight1, bias1, rowscale)
    call = forward_record(x, residual, x1, *parameters, dropout_mask, dropout_mask1, *options)
    kernel = _core.prepare("norm", call, None, finds_kernel=True)
    _, _, is_rms_norm, _, out_dtype, residual_dtype = options
    to, rows = DTYPES[out_dtype], x.shape[:-1]
    y = x.new_empty(x.shape, dtype=to)
    y1 = x.new_empty(0 if weight1 is None else x.shape, dtype=to)
    is_stored = residual_dtype != 0
    residual_out = x.new_empty(x.shape if is_stored else 0, dtype=DTYPES.get(residual_dtype))
    mean = x.new_empty(0 if is_rms_norm else rows, dtype=torch.float32)
    rstd = x.new_empty(rows, dtype=torch.float32)
    if x.numel() > 0:
        converted = _Converted()
        converted.put_numbers(call, **dict(zip(_NUMBERS, parameters)))
        converted.put_matrices(
            call, x=x, residual=residual, x1=x1, dropout_mask=dropout_mask,
            dropout_mask1=dropout_mask1,
        )  # fmt: skip
        results = _results(y=y, y1=y1, residual_out=residual_out, mean=mean, rstd=rstd)
        _threads.run("norm", kernel, x, call, None, results)
    return y, y1, residual_out, mean, rstd


def backward(
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
    *options: Any,
) -> tuple[Tensor, ...]:
    """schemas.def."""
    gradients = (dy, dy1, dresidual_out, z, mean, rstd)
    parameters = (weight, bias, weight1, bias1, rowscale)
    call, grad = backward_records(*gradients, *parameters, dropout_mask, dropout_mask1, x, *options)
    kernel = _core.prepare("norm", call, grad, finds_kernel=True)
    _, is_rms_norm, _, has_residual, has_x1, x_dtype = options
    to, masked = DTYPES[x_dtype], dropout_mask is not None
    scaled = x if rowscale is not None else None
    own_dresidual = has_own_dresidual(has_residual, masked, rowscale is not None, to == z.dtype)
    dx = z.new_empty(z.shape, dtype=to)
    dx1 = z.new_empty(z.shape if has_x1 and masked else 0, dtype=to)
    dresidual = z.new_empty(z.shape if own_dresidual else 0)
    asked = (weight, bias, weight1, bias1, None if scaled is None else rowscale)
    sums = [z.new_empty(0 if p is None else p.numel(), dtype=torch.float32) for p in asked]
    if z.numel() == 0:
        for total in sums:
            total.zero_()
    else:
        converted = _Converted()
        converted.put_numbers(call, **dict(zip(_NUMBERS, parameters)))
        converted.put_matrices(
            call, x=scaled, dropout_mask=dropout_mask, dropout_mask1=dropout_mask1
        )
        converted.put_matrices(grad, dy=dy, dy1=dy1, dresidual_out=dresidual_out, z=z)
        converted.put_numbers(grad, mean=None if is_rms_norm else mean, rstd=rstd)
        names = ("dweight", "dbias", "dweight1", "dbias1", "drowscale")
        results = _results(dx=dx, dx1=dx1, dresidual=dresidual, **dict(zip(names, sums)))
        size = _core.loaded().anyflash_norm_workspace(*map(_core.reference, (grad, results)))
        workspace = z.new_empty(size, dtype=torch.uint8)
        results.workspace = workspace.data_ptr()
        _threads.run("norm", kernel, z, call, grad, results)
    finished = (
        z.new_empty(0) if p is None else total.to(p.dtype).reshape(p.shape)
        for p, total in zip(asked, sums)
    )
    return dx, dx1, dresidual, *finished
