"""The functions of upstream's compiled loss (csrc/xentropy): positional arguments, no autograd.

They run on every device. A label that is no column of the logits is no error here: its row has the
smoothing term alone, as callers with a split vocabulary or an ignored label expect.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyflash._operators import runs_on_kernel
from anyflash._operators.cross_entropy import Options, implementation, write_gradient


def _options(logits: Tensor, smoothing: float, total_classes: int) -> Options:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise RuntimeError(
            f"logits: expected (rows, vocab) with at least one class, got {tuple(logits.shape)}"
        )
    vocab = logits.shape[1]
    return Options(smoothing, 1.0, 0.0, _NEVER, 0, total_classes if total_classes > 0 else vocab)


#: No label is ignored.
_NEVER = -(2**63)


@torch.no_grad()
def forward(
    input: Tensor, labels: Tensor, smoothing: float, total_classes: int = -1
) -> list[Tensor]:
    """[losses, lse] of each row, fp32.

    Args:
        input: (rows, vocab) logits, fp16, bf16, fp32 or fp64.
        labels: (rows,) int64, counted from the first column.
        smoothing: 0 <= it < 1.
        total_classes: classes that the smoothing is spread over; -1: vocab.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
    """
    o = _options(input, smoothing, total_classes)
    inside = (labels >= 0) & (labels < input.shape[1])
    run = implementation("cross_entropy_forward", runs_on_kernel("cross_entropy", input))
    losses, _, lse = run(input, labels.masked_fill(~inside, 0), None, *o)
    # The operator leaves the lse out where the columns are a part of the classes.
    missing = lse if o.total_classes > input.shape[1] else 0.0
    at_first = (1 - smoothing) * (lse - input[:, 0])
    return [torch.where(inside, losses + missing, losses + missing - at_first), lse]


@torch.no_grad()
def backward(
    grad_loss: Tensor,
    logits: Tensor,
    max_log_sum_exp: Tensor,
    labels: Tensor,
    smoothing: float,
    inplace: bool,
    total_classes: int = -1,
) -> Tensor:
    """The gradient of the logits, in their dtype.

    Args:
        grad_loss: (rows,) fp32.
        logits: (rows, vocab).
        max_log_sum_exp: (rows,) fp32, the lse of the forward, or that over all classes.
        labels: (rows,) int64.
        smoothing: as in the forward.
        inplace: write it over the logits.
        total_classes: as in the forward.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
    """
    if grad_loss.numel() == 0:
        return logits if inplace else torch.empty_like(logits)
    o = _options(logits, smoothing, total_classes)
    on_kernel = runs_on_kernel("cross_entropy", logits)
    return write_gradient(on_kernel, inplace, grad_loss, logits, labels, max_log_sum_exp, *o)
