"""An MLP with squared relu."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn as nn
from torch import Tensor

from flash_attn.ops._fused_functions import FusedMLPFunc, check_mlp_options, fused_mlp_func

# Upstream's module has these names too.
from flash_attn.ops.activations import sqrelu_bwd, sqrelu_fwd  # noqa: F401
from flash_attn.ops.triton.linear import triton_dgrad_act, triton_linear_act  # noqa: F401
from flash_attn.utils.torch import custom_bwd, custom_fwd  # noqa: F401

_ACTIVATION = "sqrelu"


class FusedDenseSqreluDenseFunc(FusedMLPFunc):
    """(x, weight1, bias1, weight2, bias2, checkpoint_lvl) of fused_mlp_func, by position."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Optional[Tensor],
        weight2: Tensor,
        bias2: Optional[Tensor],
        checkpoint_lvl: int = 0,
    ) -> Tensor:
        return FusedMLPFunc.forward(
            ctx, x, weight1, bias1, weight2, bias2, _ACTIVATION, True, False, checkpoint_lvl
        )

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        return (*FusedMLPFunc.backward(ctx, grad_output)[:5], None)


fused_dense_sqrelu_dense_function = FusedDenseSqreluDenseFunc.apply


class FusedDenseSqreluDense(nn.Module):
    """fc2(relu(fc1(x)) squared)."""

    def __init__(
        self,
        in_features: int,
        hidden_features: Optional[int] = None,
        out_features: Optional[int] = None,
        bias1: bool = True,
        bias2: bool = True,
        checkpoint_lvl: int = 0,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        """hidden_features: by default 4 * in_features; out_features: in_features; checkpoint_lvl:
        see fused_mlp_func. (Upstream asks for both biases.)"""
        check_mlp_options(_ACTIVATION, checkpoint_lvl, "auto")
        super().__init__()
        hidden_features = hidden_features or in_features * 4
        out_features = out_features or in_features
        factory = {"device": device, "dtype": dtype}
        self.checkpoint_lvl = checkpoint_lvl
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, **factory)
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(..., out_features)."""
        return fused_mlp_func(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=_ACTIVATION,
            checkpoint_lvl=self.checkpoint_lvl,
        )
