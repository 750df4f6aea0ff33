"""fused_dense_func and fused_mlp_func, and their autograd.Functions for process groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

import anyflash
from anyflash import _autocast, backends
from anyflash._activations import activation_number
from anyflash._autograd import first_derivative_only
from flash_attn.utils.distributed import all_gather_raw, all_reduce_raw, reduce_scatter_raw
from flash_attn.utils.torch import custom_bwd, custom_fwd

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ops = torch.ops.anyflash
#: Upstream's names of the activations, and those of anyflash.fused_mlp.
_ACTIVATIONS = {"gelu_approx": "gelu_tanh", "relu": "relu", "sqrelu": "squared_relu"}


def check_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> None:
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x: expected (..., {weight.shape[-1]}) for weight {tuple(weight.shape)}, "
            f"got {tuple(x.shape)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}, got {tensor.device}")
        if tensor.dtype != x.dtype and not _autocast.is_enabled(x):
            raise ValueError(f"{name}: expected x's dtype {x.dtype}, got {tensor.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias: expected ({weight.shape[0]},), the rows of weight, got {tuple(bias.shape)}"
        )


def check_mlp_options(activation: str, checkpoint_lvl: int, heuristic: Union[int, str]) -> None:
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"activation: expected one of {', '.join(_ACTIVATIONS)}, got {activation!r}"
        )
    if checkpoint_lvl not in (0, 1, 2):
        raise ValueError(f"checkpoint_lvl: expected 0, 1 or 2, got {checkpoint_lvl!r}")
    if heuristic != "auto" and heuristic not in range(-1, 5):
        raise ValueError(f"heuristic: expected 'auto' or -1 to 4, got {heuristic!r}")


def _cast(x: Tensor, *others: Optional[Tensor]) -> list[Any]:
    """Contiguous, and in autocast's dtype where that is on: a tensor for each tensor, None for each
    None."""
    tensors: Iterable[Optional[Tensor]] = (x, *others)
    if _autocast.is_enabled(x):
        tensors = _autocast.cast(*tensors)
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _gathered(ctx: Any, x: Tensor) -> tuple[Tensor, Any]:
    """(the rows that the layer sees, a handle to wait for or None)."""
    if ctx.process_group is None or not ctx.sequence_parallel:
        return x, None
    return all_gather_raw(x, ctx.process_group, async_op=True)


def _reduced(ctx: Any, dx: Tensor) -> tuple[Tensor, Any]:
    """(the gradient of this rank's rows, from all ranks' features; a handle or None)."""
    if ctx.process_group is None:
        return dx, None
    reduce = reduce_scatter_raw if ctx.sequence_parallel else all_reduce_raw
    return reduce(dx, ctx.process_group, async_op=True)


def _wait(result: tuple[Tensor, Any]) -> Tensor:
    tensor, handle = result
    if handle is not None:
        handle.wait()
    return tensor


def _with_residual(dx: Tensor, residuals: tuple[Tensor, ...]) -> Tensor:
    """The gradient of an input that was also returned."""
    for gradient in residuals:
        dx = dx + gradient
    return dx


class FusedDenseFunc(torch.autograd.Function):
    """fused_dense_func, for a process group as well: its arguments, by position.

    The gradient of x is summed over the ranks while that of the weight is computed.
    """

    @staticmethod
    @custom_fwd
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        return_residual: bool = False,
        process_group: Optional[ProcessGroup] = None,
        sequence_parallel: bool = True,
    ) -> Any:
        ctx.process_group = process_group
        ctx.sequence_parallel = sequence_parallel
        x, weight, bias = _cast(x, weight, bias)
        ctx.save_for_backward(x, weight)
        # Detached: a product of three dimensions is a view, and what a Function returns as a view
        # cannot be written in place through its parts (rotary embedding of q, then of k).
        out = F.linear(_wait(_gathered(ctx, x)), weight, bias).detach()
        return (out, x) if return_residual else out

    @staticmethod
    @custom_bwd
    @first_derivative_only
    def backward(ctx: Any, grad_output: Tensor, *args: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        total_x = _gathered(ctx, x) if needs_weight else None
        reduced = _reduced(ctx, grad_output @ weight) if needs_x else None
        dweight = dbias = dx = None
        count = grad_output.shape[:-1].numel()  # not left to -1: there may be no features
        rows = grad_output.reshape(count, weight.shape[0])
        if total_x is not None:
            dweight = rows.t() @ _wait(total_x).reshape(count, weight.shape[1])
        if needs_bias:
            dbias = rows.sum(0)
        if reduced is not None:
            dx = _with_residual(_wait(reduced), args)
        return dx, dweight, dbias, None, None, None


def fused_dense_func(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    return_residual: bool = False,
    process_group: Optional[ProcessGroup] = None,
    sequence_parallel: bool = True,
) -> Any:
    """x weight^T + bias.

    Args:
        x: (..., in_features); with sequence parallelism this rank's rows.
        weight: (out_features, in_features), with a process group this rank's outputs.
        bias: (out_features,) or None.
        return_residual: also returns ``x``, the object itself.
        process_group, sequence_parallel: see flash_attn.ops.fused_dense.

    Returns:
        (..., out_features), or that and x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; this process is not in the
            group.
    """
    check_linear(x, weight, bias)
    if process_group is None:
        out = F.linear(x, weight, bias)
    else:
        out = FusedDenseFunc.apply(x, weight, bias, False, process_group, sequence_parallel)
    return (out, x) if return_residual else out


class FusedMLPFunc(torch.autograd.Function):
    """fused_mlp_func for a process group: its arguments, by position."""

    @staticmethod
    @custom_fwd
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Optional[Tensor],
        weight2: Tensor,
        bias2: Optional[Tensor],
        activation: str = "gelu_approx",
        save_pre_act: bool = True,
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: int = 0,
        process_group: Optional[ProcessGroup] = None,
        sequence_parallel: bool = True,
    ) -> Any:
        check_mlp_options(activation, checkpoint_lvl, heuristic)
        ctx.process_group = process_group
        ctx.sequence_parallel = sequence_parallel
        number = activation_number(_ACTIVATIONS[activation])
        ctx.options = (bias2 is not None, number, backends.current_code())
        x, weight1, bias1, weight2, bias2 = _cast(x, weight1, bias1, weight2, bias2)
        save_hidden = save_pre_act and checkpoint_lvl < 2
        out, hidden = _ops._fused_mlp_forward.default(
            _wait(_gathered(ctx, x)), weight1, bias1, weight2, bias2, number, save_hidden,
            backends.current_code(),
        )  # fmt: skip
        ctx.save_for_backward(x, weight1, bias1, weight2, hidden)
        return (out, x) if return_residual else out

    @staticmethod
    @custom_bwd
    @first_derivative_only
    def backward(ctx: Any, grad_output: Tensor, *args: Tensor) -> tuple[Any, ...]:
        x, weight1, bias1, weight2, hidden = ctx.saved_tensors
        dx, dweight1, dbias1, dweight2, dbias2 = _ops._fused_mlp_backward.default(
            grad_output, _wait(_gathered(ctx, x)), weight1, bias1, weight2, hidden, *ctx.options
        )
        if ctx.needs_input_grad[0]:
            dx = _with_residual(_wait(_reduced(ctx, dx)), args)
        given = (dx, dweight1, dbias1, dweight2, dbias2)
        return (*(g if n else None for g, n in zip(given, ctx.needs_input_grad)), *(None,) * 7)


def fused_mlp_func(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Optional[Tensor] = None,
    bias2: Optional[Tensor] = None,
    activation: str = "gelu_approx",
    save_pre_act: bool = True,
    return_residual: bool = False,
    checkpoint_lvl: int = 0,
    heuristic: int = 0,
    process_group: Optional[ProcessGroup] = None,
    sequence_parallel: bool = True,
) -> Any:
    """act(x weight1^T + bias1) weight2^T + bias2, by the operator of anyflash.fused_mlp.

    Args:
        x: (..., in_features); with sequence parallelism this rank's rows.
        weight1: (hidden_features, in_features), with a process group this rank's hidden features.
        weight2: (out_features, hidden_features).
        bias1: (hidden_features,) or None.
        bias2: (out_features,) or None.
        activation: "gelu_approx", "relu" or "sqrelu", relu squared. (Where upstream does not fuse,
            "sqrelu" computes relu.)
        save_pre_act: false: as checkpoint_lvl 2.
        return_residual: also returns ``x``, the object itself.
        checkpoint_lvl: 0, 1: the backward finds act's input saved; 2: it computes it again, in
            slices, so that nothing of the hidden width is kept or whole.
        heuristic: "auto" or -1 to 4; a hint to cuBLASLt upstream, without effect.
        process_group, sequence_parallel: see flash_attn.ops.fused_dense. The result is this rank's
            summand.

    Returns:
        (..., out_features), or that and x.

    Raises:
        ValueError: an unknown activation, checkpoint_lvl or heuristic; this process is not in the
            group.
        RuntimeError: shapes, dtypes or devices that do not fit together.
    """
    check_mlp_options(activation, checkpoint_lvl, heuristic)
    if process_group is None:
        recompute = checkpoint_lvl == 2 or not save_pre_act
        name = _ACTIVATIONS[activation]
        out = anyflash.fused_mlp(x, weight1, bias1, weight2, bias2, name, recompute)
    else:
        out = FusedMLPFunc.apply(
            x, weight1, bias1, weight2, bias2, activation, save_pre_act, False, checkpoint_lvl,
            heuristic, process_group, sequence_parallel,
        )  # fmt: skip
    return (out, x) if return_residual else out
