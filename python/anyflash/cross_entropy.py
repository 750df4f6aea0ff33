"""anyflash.cross_entropy: softmax cross entropy per row, over all classes or one process's part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._autograd import in_plain_eager, is_exporting, is_seen, is_traced, needs_autograd
from ._groups import place_in
from ._operators import runs_on_kernel
from ._operators.cross_entropy import (
    Options,
    apply_cross_entropy,
    has_own_rows,
    implementation,
)


def _place(process_group: Any) -> tuple[int, int]:
    """(rank, number of processes)."""
    return (0, 1) if process_group is None else place_in(process_group)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each row, computed in fp32 without a copy of the logits.

    With x = logit_scale * logits and lse = log(sum(exp(x))) over the classes, the loss of a row is
    ``(1 - label_smoothing) * (lse - x[label]) + label_smoothing * (lse - mean(x))
    + lse_square_scale * lse**2``. For rows whose label is ``ignore_index`` loss and gradient are 0.

    Args:
        logits: (rows, vocab), fp16, bf16, fp32 or fp64, rows of any stride. Its gradient has its
            dtype.
        labels: (rows,) integers: 0 <= label < number of classes, or ``ignore_index``.
        precomputed_lse: (rows,) fp32 (fp64 for fp64 logits), the lse of these logits; saves the
            forward's pass over them. Used where ``logit_scale`` is 1 and ``label_smoothing`` 0;
            the gradient is that of an lse computed here.
        label_smoothing: 0 <= it < 1, the share of the loss that is spread over all classes.
        logit_scale: positive.
        lse_square_scale: weight of the z-loss lse**2.
        ignore_index: the label of rows that do not count; any integer.
        inplace_backward: the backward writes the gradient over the logits instead of into new
            memory. Whoever uses their old values afterwards gets autograd's error for values
            modified in place. Not done for rows that overlap or are not contiguous, under
            torch.compile and under functorch transforms, where the result is the same.
        process_group: every process of this torch.distributed group holds one part of the classes:
            (rows, vocab) logits with the classes rank * vocab + (0 .. vocab - 1), and the same
            labels. Each gets the loss over all classes, and the gradient of its part.

    Returns:
        ``(losses, z_losses)``, both (rows,) fp32 (fp64 for fp64 logits). losses contain z_losses,
        which are for logging and have no gradient.

    Raises:
        RuntimeError: shapes, dtypes, devices or options that do not fit; on a CPU, a label without
            a class, and on every process where the parts are not equally wide. On other devices,
            and in compiled PyTorch operations, where the check would wait for the device, such a
            loss is NaN.
        ValueError: ``process_group`` is no group of torch.distributed that this process is in.
        TypeError: logits or labels are not tensors.
    """
    for name, tensor in (("logits", logits), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if labels.dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        labels = labels.long()
    rank, world_size = _place(process_group)
    vocab = logits.shape[-1] if logits.dim() > 0 else 0
    options = Options(
        label_smoothing,
        logit_scale,
        lse_square_scale,
        ignore_index,
        rank * vocab,
        world_size * vocab,
    )
    on_kernel = runs_on_kernel("cross_entropy", logits)
    # In the operations that a graph shows instead of the operator it would be a constant.
    shows_operations = not on_kernel and (is_traced() or is_exporting())
    if logit_scale != 1.0 or label_smoothing != 0.0 or shows_operations:
        precomputed_lse = None
    in_graph = shows_operations or (on_kernel and is_seen())
    if world_size > 1 or (needs_autograd(logits) and not in_graph):
        inplace = inplace_backward and in_plain_eager() and has_own_rows(logits)
        group = process_group if world_size > 1 else None
        return apply_cross_entropy(
            logits, labels, precomputed_lse, *options, inplace, group, on_kernel
        )[:2]
    forward = implementation("cross_entropy_forward", on_kernel)
    return forward(logits, labels, precomputed_lse, *options)[:2]
