"""Collectives of tensor and sequence parallelism, with gradients, and what keeps parameters alike.

``process_group`` is a group of torch.distributed that this process belongs to, or None for the
default one. Gathering and scattering go along dimension 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from anyflash._groups import place_in

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def group_size(process_group: Optional[ProcessGroup]) -> int:
    """The number of processes in the group.

    Raises:
        ValueError: this process is not in it, or it is none.
    """
    return place_in(process_group)[1]


def _collective(*names: str) -> Any:
    """torch.distributed's function of the first name that it has; the later ones are older."""
    return next(getattr(dist, name) for name in names if hasattr(dist, name))


def all_gather_raw(
    input_: Tensor, process_group: ProcessGroup, async_op: bool = False
) -> tuple[Tensor, Any]:
    """(the inputs of all ranks, one after the other; handle). Records nothing for autograd.

    Args:
        input_: (n, ...), of the same shape on every rank.
        process_group: see the module.
        async_op: returns at once; the result is there after ``handle.wait()``. Else handle is None.

    Raises:
        ValueError: a tensor without dimensions; a group without this process.
    """
    if input_.dim() == 0:
        raise ValueError("input_: expected at least one dimension to gather along, got a scalar")
    shape = (group_size(process_group) * input_.shape[0], *input_.shape[1:])
    output = input_.new_empty(shape)
    gather = _collective("all_gather_single", "all_gather_into_tensor")
    handle = gather(output, input_.contiguous(), group=process_group, async_op=async_op)
    return output, handle


def reduce_scatter_raw(
    input_: Tensor, process_group: ProcessGroup, async_op: bool = False
) -> tuple[Tensor, Any]:
    """(this rank's share of the sum of all inputs; handle). Records nothing for autograd.

    Args:
        input_: (n, ...), of the same shape on every rank, n a multiple of the group's size.
        process_group, async_op: as in all_gather_raw.

    Raises:
        ValueError: n does not divide; a group without this process.
    """
    size = group_size(process_group)
    if input_.dim() == 0 or input_.shape[0] % size:
        raise ValueError(
            f"input_: expected a first dimension that is a multiple of the {size} processes of "
            f"process_group, got {tuple(input_.shape)}"
        )
    output = input_.new_empty((input_.shape[0] // size, *input_.shape[1:]))
    scatter = _collective("reduce_scatter_single", "reduce_scatter_tensor")
    handle = scatter(output, input_.contiguous(), group=process_group, async_op=async_op)
    return output, handle


def all_reduce_raw(
    input_: Tensor, process_group: ProcessGroup, async_op: bool = False
) -> tuple[Tensor, Any]:
    """(the sum of all inputs; handle). Records nothing for autograd.

    The sum is in ``input_`` itself where that is contiguous, as upstream has it.

    Args:
        input_: any shape, the same on every rank.
        process_group, async_op: as in all_gather_raw.
    """
    group_size(process_group)
    input_ = input_.contiguous()
    handle = dist.all_reduce(input_, group=process_group, async_op=async_op)
    return input_, handle


class AllGatherFunc(torch.autograd.Function):
    """all_gather: the backward sums the gradients and hands every rank its own part."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: ProcessGroup) -> Tensor:
        ctx.process_group = process_group
        return all_gather_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad_output, ctx.process_group), None


class ReduceScatterFunc(torch.autograd.Function):
    """reduce_scatter: the backward gathers the gradients."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: ProcessGroup) -> Tensor:
        ctx.process_group = process_group
        return reduce_scatter_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad_output, ctx.process_group), None


class AllReduceFunc(torch.autograd.Function):
    """all_reduce: what follows is the same on all ranks, so the gradient passes as it is.

    Upstream sums in the input's memory, behind autograd's back; this one leaves the input alone.
    """

    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: ProcessGroup) -> Tensor:
        copy = input_.clone(memory_format=torch.contiguous_format)
        return all_reduce_raw(copy, process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


all_gather = AllGatherFunc.apply
reduce_scatter = ReduceScatterFunc.apply
all_reduce = AllReduceFunc.apply


def _marked(model: torch.nn.Module, mark: str) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters with the attribute, in an order that all ranks share.

    By name: ranks may have different parameters beside them, as the bias of rank 0.
    """
    return sorted(
        ((name, p) for name, p in model.named_parameters() if getattr(p, mark, False)),
        key=lambda item: item[0],
    )


@torch.no_grad()
def sync_shared_params(model: torch.nn.Module, process_group: ProcessGroup) -> None:
    """Gives the parameters marked ``_shared_params`` the values that rank 0 of the group has."""
    group_size(process_group)
    group = dist.group.WORLD if process_group is None else process_group
    source = dist.get_global_rank(group, 0)
    for _, parameter in _marked(model, "_shared_params"):
        dist.broadcast(parameter, src=source, group=group)


@torch.no_grad()
def allreduce_sequence_parallel_grad(model: torch.nn.Module, process_group: ProcessGroup) -> None:
    """Sums over the ranks the gradients of the parameters marked ``_sequence_parallel``, in place.

    Frozen parameters are left out.

    Raises:
        ValueError: a parameter has no gradient, which the other ranks would wait for.
    """
    group_size(process_group)
    gradients = []
    for name, parameter in _marked(model, "_sequence_parallel"):
        if parameter.grad is not None:
            gradients.append(parameter.grad)
        elif parameter.requires_grad:
            raise ValueError(f"model: expected a gradient in {name}, got None")
    if not gradients:
        return
    together = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(together, group=process_group)
    parts = together.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))


def get_dim_for_local_rank(dim: int, world_size: int, local_rank: int, multiple_of: int = 1) -> int:
    """The share of ``dim`` that falls to a rank, in units of ``multiple_of``.

    What does not divide evenly goes to the first ranks.

    Raises:
        ValueError: dim is no multiple of multiple_of, where upstream drops the rest.
    """
    if dim % multiple_of:
        raise ValueError(f"dim: expected a multiple of {multiple_of}, got {dim}")
    share, rest = divmod(dim // multiple_of, world_size)
    return (share + (local_rank < rest)) * multiple_of
