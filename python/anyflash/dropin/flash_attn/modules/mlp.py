"""MLPs of two linear layers, ``fc1`` and ``fc2``, plain and gated, tensor-parallel too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from anyflash import bias_activation
from flash_attn.ops.activations import swiglu  # noqa: F401  (upstream's module has this name)
from flash_attn.ops.fused_dense import (  # noqa: F401  (clients take FusedMLP from here)
    ColumnParallelLinear,
    FusedMLP,
    ParallelFusedMLP,
    RowParallelLinear,
)
from flash_attn.utils.distributed import group_size

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Activation = Callable[[Tensor], Tensor]


def _default(features: Optional[int], otherwise: int) -> int:
    return otherwise if features is None else features


class Mlp(nn.Module):
    """fc2(activation(fc1(x)))."""

    def __init__(
        self,
        in_features: int,
        hidden_features: Optional[int] = None,
        out_features: Optional[int] = None,
        activation: Activation = F.gelu,
        bias1: bool = True,
        bias2: bool = True,
        return_residual: bool = False,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        """hidden_features: by default 4 * in_features; out_features: in_features."""
        super().__init__()
        hidden_features = _default(hidden_features, in_features * 4)
        out_features = _default(out_features, in_features)
        factory = {"device": device, "dtype": dtype}
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, **factory)
        self.activation = activation
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, **factory)

    def forward(self, x: Tensor) -> Any:
        """(..., out_features), with return_residual that and x itself."""
        out = self.fc2(self.activation(self.fc1(x)))
        return (out, x) if self.return_residual else out


class ParallelMLP(nn.Module):
    """Mlp of which every rank of ``process_group`` holds a share of the hidden features."""

    def __init__(
        self,
        in_features: int,
        hidden_features: Optional[int] = None,
        out_features: Optional[int] = None,
        activation: Activation = F.gelu,
        process_group: Optional[ProcessGroup] = None,
        sequence_parallel: bool = True,
        bias1: bool = True,
        bias2: bool = True,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        """Sizes as in Mlp; process_group and sequence_parallel as in flash_attn.ops.fused_dense."""
        super().__init__()
        hidden_features = _default(hidden_features, in_features * 4)
        out_features = _default(out_features, in_features)
        group: Any = process_group  # None: refused there, with a message
        options = {"sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        self.fc1 = ColumnParallelLinear(in_features, hidden_features, group, bias=bias1, **options)
        self.activation = activation
        self.fc2 = RowParallelLinear(hidden_features, out_features, group, bias=bias2, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ..., out_features); with sequence parallelism this rank's rows, of x as well."""
        return self.fc2(self.activation(self.fc1(x)))


def _gated_width(in_features: int, hidden_features: Optional[int], multiple_of: int) -> int:
    """8/3 of in_features or what is given, rounded up to a multiple."""
    if multiple_of < 1:
        raise ValueError(f"multiple_of: expected 1 or more, got {multiple_of}")
    width = _default(hidden_features, int(8 * in_features / 3))
    return (width + multiple_of - 1) // multiple_of * multiple_of


def _gate(y: Tensor, activation: Activation) -> Tensor:
    """value * activation(gate) for (value, gate) = halves of y's last dimension."""
    if activation == F.sigmoid:
        return F.glu(y, dim=-1)
    if activation == F.silu:
        return bias_activation(y, activation="silu_gate")
    value, gate = y.chunk(2, dim=-1)
    return value * activation(gate)


class GatedMlp(nn.Module):
    """fc2(value * activation(gate)) for (value, gate) = halves of fc1(x). silu makes it SwiGLU."""

    def __init__(
        self,
        in_features: int,
        hidden_features: Optional[int] = None,
        out_features: Optional[int] = None,
        activation: Activation = F.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        return_residual: bool = False,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        """hidden_features: by default 8/3 of in_features, and rounded up to a multiple of
        multiple_of, also where it is given."""
        super().__init__()
        hidden_features = _gated_width(in_features, hidden_features, multiple_of)
        out_features = _default(out_features, in_features)
        factory = {"device": device, "dtype": dtype}
        self.return_residual = return_residual
        self.fc1 = nn.Linear(in_features, 2 * hidden_features, bias=bias1, **factory)
        self.activation = activation
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, **factory)

    def forward(self, x: Tensor) -> Any:
        """(..., out_features), with return_residual that and x itself."""
        out = self.fc2(_gate(self.fc1(x), self.activation))
        return (out, x) if self.return_residual else out


class ParallelGatedMlp(nn.Module):
    """GatedMlp of which every rank of ``process_group`` holds a share of the hidden features.

    The rows of a rank's ``fc1.weight`` are its values, then its gates.
    """

    def __init__(
        self,
        in_features: int,
        process_group: ProcessGroup,
        hidden_features: Optional[int] = None,
        out_features: Optional[int] = None,
        activation: Activation = F.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        """Sizes as in GatedMlp; process_group and sequence_parallel as in
        flash_attn.ops.fused_dense.

        Raises:
            ValueError: the group's size does not divide the hidden features.
        """
        super().__init__()
        hidden_features = _gated_width(in_features, hidden_features, multiple_of)
        size = group_size(process_group)
        if hidden_features % size:
            raise ValueError(
                f"process_group: expected a size that divides the {hidden_features} hidden "
                f"features, got {size}"
            )
        out_features = _default(out_features, in_features)
        options = {"sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        self.fc1 = ColumnParallelLinear(
            in_features, 2 * hidden_features, process_group, bias=bias1, **options
        )
        self.activation = activation
        self.fc2 = RowParallelLinear(
            hidden_features, out_features, process_group, bias=bias2, **options
        )

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ..., out_features); with sequence parallelism this rank's rows, of x as well."""
        return self.fc2(_gate(self.fc1(x), self.activation))
