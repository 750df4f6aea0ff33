"""Linear layers and two-layer MLPs, tensor-parallel too, with upstream's names and state dicts.

Every device and floating dtype. With ``process_group`` this process holds a share of the features:
of a layer's outputs (column parallel) or of its inputs (row parallel). With ``sequence_parallel``
it also holds a share of the rows, along dimension 0: they are gathered on the way in, and again for
the backward, and scattered on the way out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional, Union

import torch
import torch.nn as nn
from torch import Tensor

from anyflash._groups import place_in
from flash_attn.ops._fused_functions import (
    FusedDenseFunc,
    FusedMLPFunc,
    check_mlp_options,
    fused_dense_func,
    fused_mlp_func,
)

# Upstream's module has these names too.
from flash_attn.ops.activations import gelu_bwd, relu_bwd, sqrelu_bwd, sqrelu_fwd  # noqa: F401
from flash_attn.utils.distributed import (  # noqa: F401
    all_gather_raw,
    all_reduce,
    all_reduce_raw,
    get_dim_for_local_rank,
    reduce_scatter,
    reduce_scatter_raw,
)
from flash_attn.utils.torch import custom_bwd, custom_fwd  # noqa: F401

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "ColumnParallelLinear",
    "FusedDense",
    "FusedDenseFunc",
    "FusedMLP",
    "FusedMLPFunc",
    "ParallelFusedMLP",
    "RowParallelLinear",
    "fused_dense_func",
    "fused_mlp_func",
]


class FusedDense(nn.Linear):
    """nn.Linear that can return its input as well."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_residual: bool = False,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.return_residual = return_residual

    def forward(self, x: Tensor, process_group: Optional[ProcessGroup] = None) -> Any:
        """fused_dense_func; with a process group x holds this rank's rows."""
        return fused_dense_func(
            x, self.weight, self.bias, self.return_residual, process_group=process_group
        )


def _share(name: str, features: int, process_group: ProcessGroup, multiple_of: int) -> int:
    """This rank's number of features."""
    if features % multiple_of:
        raise ValueError(f"{name} ({features}) must be a multiple of {multiple_of}")
    rank, size = place_in(process_group)
    return get_dim_for_local_rank(features, size, rank, multiple_of)


def _default_group(process_group: Optional[ProcessGroup]) -> ProcessGroup:
    """torch.distributed's reading of None, for functions where None says that there is no group."""
    group: Any = torch.distributed.group.WORLD if process_group is None else process_group
    return group


class ColumnParallelLinear(nn.Linear):
    """A linear layer of which every rank computes a share of the outputs.

    ``weight`` (share, in_features), ``bias`` (share,). The share is a multiple of ``multiple_of``;
    the first ranks take what does not divide evenly. Without a process group: the default one.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: ProcessGroup,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        share = _share("out_features", out_features, process_group, multiple_of)
        super().__init__(in_features, share, bias=bias, device=device, dtype=dtype)
        self.process_group = _default_group(process_group)
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ..., share); x (rows, ..., in_features), with sequence parallelism a share of the
        rows."""
        return fused_dense_func(
            x,
            self.weight,
            self.bias,
            process_group=self.process_group,
            sequence_parallel=self.sequence_parallel,
        )


class RowParallelLinear(nn.Linear):
    """A linear layer of which every rank holds a share of the inputs; the results are summed.

    ``weight`` (out_features, share); ``bias`` (out_features,) on rank 0 alone. The shares are those
    of ColumnParallelLinear.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: ProcessGroup,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        share = _share("in_features", in_features, process_group, multiple_of)
        bias = bias and torch.distributed.get_rank(process_group) == 0
        super().__init__(share, out_features, bias=bias, device=device, dtype=dtype)
        self.process_group = _default_group(process_group)
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ..., out_features), with sequence parallelism this rank's share of the rows; x
        (rows, ..., share)."""
        out = fused_dense_func(x, self.weight, self.bias)
        return _summed(out, self.process_group, self.sequence_parallel)


def _summed(out: Tensor, process_group: ProcessGroup, sequence_parallel: bool) -> Tensor:
    """The sum of the ranks' results, whole or this rank's rows."""
    return (reduce_scatter if sequence_parallel else all_reduce)(out, process_group)


class FusedMLP(nn.Module):
    """Two linear layers, ``fc1`` and ``fc2``, with an activation between them: fused_mlp_func."""

    def __init__(
        self,
        in_features: int,
        hidden_features: Optional[int] = None,
        out_features: Optional[int] = None,
        bias1: bool = True,
        bias2: bool = True,
        activation: str = "gelu_approx",
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: Union[int, str] = "auto",
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        """hidden_features: by default 4 * in_features; out_features: in_features."""
        check_mlp_options(activation, checkpoint_lvl, heuristic)
        super().__init__()
        hidden_features = hidden_features or in_features * 4
        out_features = out_features or in_features
        factory = {"device": device, "dtype": dtype}
        self.activation = activation
        self.return_residual = return_residual
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic if activation != "sqrelu" else -1
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, **factory)
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, **factory)

    def forward(self, x: Tensor, process_group: Optional[ProcessGroup] = None) -> Any:
        """(..., out_features), with return_residual that and x; with a process group both for this
        rank's rows."""
        out = _mlp(self, x, process_group, True)
        if process_group is not None:
            out = reduce_scatter(out, process_group)
        return (out, x) if self.return_residual else out


def _mlp(
    module: Any, x: Tensor, process_group: Optional[ProcessGroup], sequence_parallel: bool
) -> Tensor:
    return fused_mlp_func(
        x,
        module.fc1.weight,
        module.fc2.weight,
        module.fc1.bias,
        module.fc2.bias,
        activation=module.activation,
        save_pre_act=module.training,
        checkpoint_lvl=module.checkpoint_lvl,
        heuristic=module.heuristic,
        process_group=process_group,
        sequence_parallel=sequence_parallel,
    )


class ParallelFusedMLP(nn.Module):
    """FusedMLP of which every rank holds a share of the hidden features.

    ``fc1`` is a ColumnParallelLinear, ``fc2`` a RowParallelLinear.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Optional[int] = None,
        out_features: Optional[int] = None,
        activation: str = "gelu_approx",
        process_group: Optional[ProcessGroup] = None,
        bias1: bool = True,
        bias2: bool = True,
        sequence_parallel: bool = True,
        checkpoint_lvl: int = 0,
        heuristic: Union[int, str] = "auto",
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        """Defaults as in FusedMLP; process_group is required.

        Raises:
            ValueError: as fused_mlp_func, or no process group.
        """
        check_mlp_options(activation, checkpoint_lvl, heuristic)
        if process_group is None:
            raise ValueError("process_group: expected a group of torch.distributed, got None")
        super().__init__()
        hidden_features = hidden_features or in_features * 4
        out_features = out_features or in_features
        factory = {"device": device, "dtype": dtype}
        self.activation = activation
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic if activation != "sqrelu" else -1
        self.fc1 = ColumnParallelLinear(
            in_features, hidden_features, process_group, bias=bias1, **factory
        )
        self.fc2 = RowParallelLinear(
            hidden_features, out_features, process_group, bias=bias2, **factory
        )

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ..., out_features); with sequence parallelism this rank's rows, of x as well."""
        out = _mlp(self, x, self.process_group, self.sequence_parallel)
        return _summed(out, self.process_group, self.sequence_parallel)
