"""The operators of anyflash.cross_entropy in PyTorch operations, their fakes and their derivative.

kernels/cross_entropy_params.h has the formulas.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from .. import _core, _records, _threads
from .._autograd import (
    applier,
    below_autograd,
    first_derivative_only,
    has_readable_values,
    in_plain_eager,
    is_traced,
)
from . import can_check, check, expect, record_of, statistics_dtype

_ops = torch.ops.anyflash

#: Elements of logits that are widened at a time.
_CHUNK = 1 << 24


class Options(NamedTuple):
    """What the operators take after their tensors, in their order."""

    smoothing: float
    logit_scale: float
    lse_square_scale: float
    ignore_index: int
    class_start_idx: int
    total_classes: int


def _record(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor | None,
    dlosses: Tensor | None,
    o: Options,
    in_place: bool = False,
) -> _records.CrossEntropyCall:
    tensors = {"logits": logits, "labels": labels, "lse": lse, "dlosses": dlosses}
    return record_of(
        _records.CrossEntropyCall,
        tensors,
        smoothing=o.smoothing,
        logit_scale=o.logit_scale,
        lse_square_scale=o.lse_square_scale,
        ignore_index=int(o.ignore_index),
        class_start=int(o.class_start_idx),
        total_classes=int(o.total_classes),
        in_place=in_place,
    )


def _check(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor | None,
    dlosses: Tensor | None,
    o: Options,
    in_place: bool = False,
) -> None:
    if can_check(logits, labels, lse, dlosses):
        check("cross_entropy", _record(logits, labels, lse, dlosses, o, in_place))
        return
    is_matrix = logits.is_floating_point() and logits.dim() == 2 and logits.shape[1] > 0
    expect(is_matrix, "logits", logits)
    for name, x in (("labels", labels), ("lse", lse), ("dlosses", dlosses)):
        expect(x is None or x.shape == logits.shape[:1], name, x, logits)
    expect(labels.dtype == torch.int64, "labels", labels)
    expect(0 <= o.smoothing < 1 and 0 < o.logit_scale < math.inf, "label_smoothing and logit_scale")
    last = o.class_start_idx + logits.shape[1]
    expect(o.class_start_idx >= 0 and last <= o.total_classes, "total_classes")


def _out_of_range(labels: Tensor, o: Options) -> Tensor:
    """Which labels no class has. The core has refused them where their values can be read."""
    return ((labels < 0) | (labels >= o.total_classes)) & (labels != o.ignore_index)


# ---- The operators in PyTorch operations.


def _row_chunks(logits: Tensor) -> Iterable[slice]:
    """All rows, a few at a time where each call runs by itself: their widened copies come and go.
    In a graph, which is for any number of rows, all at once."""
    if not in_plain_eager() or is_traced():
        return (slice(None),)
    rows, vocab = logits.shape
    step = max(1, _CHUNK // vocab)
    return (slice(begin, begin + step) for begin in range(0, rows, step))


def _scaled(logits: Tensor, o: Options) -> Tensor:
    wide = logits.to(statistics_dtype(logits))
    return wide if o.logit_scale == 1.0 else wide * o.logit_scale


def _label_columns(labels: Tensor, vocab: int, o: Options) -> tuple[Tensor, Tensor]:
    """Whether each label is a column here, and which; any column where it is not."""
    local = labels - o.class_start_idx
    inside = (local >= 0) & (local < vocab) & (labels != o.ignore_index)
    return inside, torch.where(inside, local, 0)


def _forward_rows(
    logits: Tensor, labels: Tensor, lse: Tensor | None, o: Options
) -> tuple[Tensor, Tensor, Tensor]:
    x = _scaled(logits, o)
    lse = torch.logsumexp(x, 1) if lse is None else lse.clone()
    is_part = x.shape[1] < o.total_classes
    reference = torch.zeros_like(lse) if is_part else lse
    inside, column = _label_columns(labels, x.shape[1], o)
    at_label = x.gather(1, column[:, None])[:, 0]
    losses = torch.where(inside, (1 - o.smoothing) * (reference - at_label), 0.0)
    if o.smoothing > 0:
        losses = losses + o.smoothing * (reference - x.sum(1) / o.total_classes)
    z_losses = o.lse_square_scale * reference.square()
    ignored = labels == o.ignore_index
    losses = (losses + z_losses).masked_fill(ignored, 0.0)
    return losses, z_losses.masked_fill(ignored, 0.0), lse


def _forward(
    logits: Tensor, labels: Tensor, precomputed_lse: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    o = Options(*options)
    _check(logits, labels, precomputed_lse, None, o)
    wrong = _out_of_range(labels, o)
    parts = [
        _forward_rows(
            logits[rows],
            labels[rows],
            None if precomputed_lse is None else precomputed_lse[rows],
            o,
        )
        for rows in _row_chunks(logits)
    ]
    if not parts:
        empty = [logits.new_empty(0, dtype=statistics_dtype(logits)) for _ in range(3)]
        return empty[0], empty[1], empty[2]
    losses, z_losses, lse = (x[0] if len(x) == 1 else torch.cat(x) for x in zip(*parts))
    return losses.masked_fill(wrong, math.nan), z_losses, lse


def _backward_rows(dlosses: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, o: Options) -> Any:
    slope = torch.exp(_scaled(logits, o) - lse[:, None])
    if o.lse_square_scale != 0.0:
        slope = slope * (1 + 2 * o.lse_square_scale * lse[:, None])
    if o.smoothing > 0:
        slope = slope - o.smoothing / o.total_classes
    inside, column = _label_columns(labels, logits.shape[1], o)
    at_label = inside.to(slope.dtype) * (1 - o.smoothing)
    slope = slope.scatter_add(1, column[:, None], -at_label[:, None])
    ignored = (labels == o.ignore_index)[:, None]
    return (slope * (dlosses[:, None] * o.logit_scale)).masked_fill(ignored, 0.0)


def _backward(
    dlosses: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, *options: Any
) -> Tensor:
    o = Options(*options)
    _check(logits, labels, lse, dlosses, o)
    parts = [
        _backward_rows(dlosses[rows], logits[rows], labels[rows], lse[rows], o).to(logits.dtype)
        for rows in _row_chunks(logits)
    ]
    if not parts:
        return logits.new_empty(logits.shape)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def has_own_rows(logits: Tensor) -> bool:
    """Whether the gradient can be written over the logits."""
    if logits.dim() != 2:
        return False
    rows, vocab = logits.shape
    neighbours = logits.stride(1) == 1 or vocab == 1
    return neighbours and (logits.stride(0) >= vocab or rows <= 1)


def _backward_(dlosses: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, *options: Any) -> None:
    o = Options(*options)
    _check(logits, labels, lse, dlosses, o, in_place=True)
    for rows in _row_chunks(logits):
        gradient = _backward_rows(dlosses[rows], logits[rows], labels[rows], lse[rows], o)
        logits[rows].copy_(gradient)


# ---- By the core.


def _run(
    call: _records.CrossEntropyCall,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor | None,
    kernel: Any,
    results: dict[str, Tensor],
) -> None:
    """Makes the views what a kernel reads, then launches."""
    readable = {
        "logits": _core.contiguous_rows(logits),
        "labels": labels.contiguous(),
        "lse": None if lse is None else lse.contiguous(),
    }
    for name, x in readable.items():
        _records.put(call, name, x)
    written = _records.new(_records.CrossEntropyResults)
    for name, x in results.items():
        _records.put(written, name, x)
    size = _core.loaded().anyflash_cross_entropy_workspace(_core.reference(call))
    workspace = logits.new_empty(size, dtype=torch.uint8)
    written.workspace = workspace.data_ptr()
    _threads.run("cross_entropy", kernel, logits, call, written)


def _forward_kernel(
    logits: Tensor, labels: Tensor, precomputed_lse: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    call = _record(logits, labels, precomputed_lse, None, Options(*options))
    kernel = _core.prepare("cross_entropy", call, finds_kernel=True)
    shape = logits.shape[:1]
    losses, z_losses, lse = (logits.new_empty(shape, dtype=torch.float32) for _ in range(3))
    results = {"losses": losses, "z_losses": z_losses, "lse": lse}
    _run(call, logits, labels, precomputed_lse, kernel, results)
    return losses, z_losses, lse


def _backward_kernel(
    dlosses: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, *options: Any
) -> Tensor:
    call = _record(logits, labels, lse, dlosses, Options(*options))
    kernel = _core.prepare("cross_entropy", call, finds_kernel=True)
    dlogits = logits.new_empty(logits.shape)
    _run(call, logits, labels, lse, kernel, {"dlogits": dlogits})
    return dlogits


def _backward_kernel_(
    dlosses: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, *options: Any
) -> None:
    call = _record(logits, labels, lse, dlosses, Options(*options), in_place=True)
    kernel = _core.prepare("cross_entropy", call, finds_kernel=True)
    _run(call, logits, labels, lse, kernel, {"dlogits": logits})


MATH: dict[str, Callable[..., Any]] = {
    "cross_entropy_forward": _forward,
    "cross_entropy_backward": _backward,
    "cross_entropy_backward_": _backward_,
}
KERNELS: dict[str, Callable[..., Any]] = {
    "cross_entropy_forward": _forward_kernel,
    "cross_entropy_backward": _backward_kernel,
    "cross_entropy_backward_": _backward_kernel_,
}


def implementation(name: str, on_kernel: bool) -> Callable[..., Any]:
    """The operator, past its autograd kernel, or the same in PyTorch operations, as
    _operators.runs_on_kernel says."""
    if not on_kernel:
        return MATH[name]
    return functools.partial(below_autograd, getattr(_ops, name).default)


def write_gradient(
    on_kernel: bool, inplace: bool, dlosses: Tensor, logits: Tensor, *rest: Any
) -> Any:
    """The gradient of the logits: the logits themselves, overwritten, or new memory."""
    if not inplace:
        return implementation("cross_entropy_backward", on_kernel)(dlosses, logits, *rest)
    implementation("cross_entropy_backward_", on_kernel)(dlosses, logits, *rest)
    return logits


# ---- The derivative.


class CrossEntropyFunction(Function):
    """(losses, z_losses, lse) of (logits, labels, precomputed_lse, *Options, inplace_backward,
    process_group, on_kernel). With a group, the columns are this process's part of the classes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor,
        labels: Tensor,
        precomputed_lse: Tensor | None,
        smoothing: float,
        logit_scale: float,
        lse_square_scale: float,
        ignore_index: int,
        class_start_idx: int,
        total_classes: int,
        inplace_backward: bool,
        process_group: Any,
        on_kernel: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        o = Options(
            smoothing, logit_scale, lse_square_scale, ignore_index, class_start_idx, total_classes
        )
        forward = implementation("cross_entropy_forward", on_kernel)
        if process_group is None:
            return forward(logits, labels, precomputed_lse, *o)
        # First of all, since unequal parts may let some processes, not all, refuse a label.
        are_unequal = _are_unequal(logits, process_group)
        results = forward(logits, labels, precomputed_lse, *o)
        return _combined(results, labels, o, process_group, are_unequal)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, labels = inputs[:2]
        _, z_losses, lse = output
        ctx.save_for_backward(logits, labels, lse)
        ctx.options = inputs[3:9]
        ctx.inplace_backward = inputs[9]
        ctx.on_kernel = inputs[11]
        ctx.mark_non_differentiable(z_losses, lse)
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dlosses: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dlosses is None:
            return (None,) * 12
        tensors = (dlosses, *ctx.saved_tensors)
        dlogits = write_gradient(ctx.on_kernel, ctx.inplace_backward, *tensors, *ctx.options)
        return (dlogits, *(None,) * 11)


def _are_unequal(logits: Tensor, process_group: Any) -> Tensor:
    """Whether the processes' parts of the classes differ in width: then nobody knows which classes
    are whose. On a CPU that is an error; elsewhere asking would wait."""
    own = torch.full((1,), logits.shape[-1:].numel(), device=logits.device)
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(process_group))]
    torch.distributed.all_gather(parts, own, group=process_group)
    widths = torch.cat(parts)
    are_unequal = (widths != own).any()
    if has_readable_values(widths) and are_unequal:
        raise RuntimeError(
            "logits: expected as many classes on each process of process_group, got "
            f"{widths.tolist()}"
        )
    return are_unequal


def _combined(
    results: tuple[Tensor, Tensor, Tensor],
    labels: Tensor,
    o: Options,
    process_group: Any,
    are_unequal: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The results for all classes, from those for this process's part of them."""
    losses, z_losses, lse = results
    world_size = torch.distributed.get_world_size(process_group)
    parts = [torch.empty_like(lse) for _ in range(world_size)]
    torch.distributed.all_gather(parts, lse, group=process_group)
    torch.distributed.all_reduce(losses, group=process_group)
    lse = torch.logsumexp(torch.stack(parts), 0).masked_fill(are_unequal, math.nan)
    ignored = labels == o.ignore_index
    z_losses = (o.lse_square_scale * lse.square()).masked_fill(ignored, 0.0)
    return (losses + lse).masked_fill(ignored, 0.0) + z_losses, z_losses, lse


apply_cross_entropy = applier(CrossEntropyFunction)


# ---- For _ops.register().


def _fake_forward(logits: Tensor, labels: Tensor, precomputed_lse: Tensor | None, *o: Any) -> Any:
    if can_check(logits, labels, precomputed_lse):
        check("cross_entropy", _record(logits, labels, precomputed_lse, None, Options(*o)))
    dtype = statistics_dtype(logits)
    return tuple(logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(3))


def _fake_backward(dlosses: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_backward_(*args: Any) -> None:
    return None


def _recorded_forward(logits: Tensor, labels: Tensor, lse: Tensor | None, *options: Any) -> Any:
    total_classes = options[-1]
    if logits.shape[1] < total_classes:
        raise RuntimeError(
            f"total_classes: expected vocab {logits.shape[1]} where a gradient is asked for, got "
            f"{total_classes}; anyflash.cross_entropy with process_group joins the parts"
        )
    return apply_cross_entropy(logits, labels, lse, *options, False, None, True)


FAKES = {
    "cross_entropy_forward": _fake_forward,
    "cross_entropy_backward": _fake_backward,
    "cross_entropy_backward_": _fake_backward_,
}
DIFFERENTIABLE = {"cross_entropy_forward": _recorded_forward}
