"""RMS norm after dropout and residual: the functions of ops.layer_norm without a mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .layer_norm import (
    DropoutAddLayerNormFn,
    DropoutAddLayerNormParallelResidualFn,
    DropoutAddLayerNormSubsetFn,
)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm of x over its last dimension, in x's dtype."""
    return dropout_add_rms_norm(x, None, weight, None, 0.0, epsilon)


def dropout_add_rms_norm(
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
    """RMS norm of dropout(x0 * rowscale) * layerscale + residual; as dropout_add_layer_norm."""
    return DropoutAddLayerNormFn.apply(
        x0, residual, weight, bias, rowscale, layerscale, dropout_p, epsilon, residual_in_fp32,
        prenorm, True, return_dropout_mask,
    )  # fmt: skip


def dropout_add_rms_norm_subset(
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
    """RMS norm of some rows of x0, into some rows of y; as dropout_add_layer_norm_subset."""
    return DropoutAddLayerNormSubsetFn.apply(
        x0, residual, weight, bias, layerscale, x0_subset, out_subset, dropout_p, epsilon,
        rowscale_const, out_numrows, residual_in_fp32, prenorm, True, return_dropout_mask,
    )  # fmt: skip


def dropout_add_rms_norm_parallel_residual(
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
    """Two RMS norms of one sum; as dropout_add_layer_norm_parallel_residual."""
    return DropoutAddLayerNormParallelResidualFn.apply(
        x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon, residual_in_fp32,
        prenorm, True, return_dropout_mask,
    )  # fmt: skip


class _Weight(nn.Module):
    """A weight that begins at 1, and no bias."""

    def __init__(
        self, hidden_size: int, eps: float, device: Any, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """weight 1."""
        nn.init.ones_(self.weight)


class RMSNorm(_Weight):
    """rms_norm with a weight of its own.

    Args:
        hidden_size: columns.
        eps: added to the mean square.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x's shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


class DropoutAddRMSNorm(_Weight):
    """dropout_add_rms_norm with a weight of its own.

    Args:
        hidden_size: columns.
        prenorm: forward returns (y, sum).
        p: the share that is dropped in training.
        eps: added to the mean square.
        residual_in_fp32: the sum is fp32 where no residual is given.
        device: of the weight.
        dtype: of the weight.
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
        super().__init__(hidden_size, eps, device, dtype)
        self.prenorm = prenorm
        self.p = p
        self.residual_in_fp32 = residual_in_fp32

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Any:
        """y, or (y, sum) with prenorm."""
        return dropout_add_rms_norm(
            x0,
            residual,
            self.weight,
            None,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )
