"""Cross entropy loss under upstream's names. No Triton: it runs on every device and dtype."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from anyflash import cross_entropy
from flash_attn._missing import absent


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Optional[Tensor] = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(losses, z_losses) of ``anyflash.cross_entropy``, fp32, each (rows,).

    Args:
        logits: (rows, vocab).
        labels: (rows,).
        precomputed_lse: (rows,) fp32; not used with label smoothing or a logit scale.
        label_smoothing: share of the loss that is spread over all classes.
        logit_scale: factor of the logits.
        lse_square_scale: weight of the z-loss.
        ignore_index: label of rows whose loss and gradient are 0.
        inplace_backward: the gradient overwrites the logits.
        process_group: the vocabulary is split over its processes.

    Returns:
        losses, and the share of the z-loss in them, which has no gradient.

    Raises:
        RuntimeError: shapes, dtypes, devices, options or labels that do not fit.
    """
    return cross_entropy(
        logits,
        labels,
        precomputed_lse,
        label_smoothing=label_smoothing,
        logit_scale=logit_scale,
        lse_square_scale=lse_square_scale,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        process_group=process_group,
    )


class CrossEntropyLoss(torch.autograd.Function):
    """``apply`` is ``cross_entropy_loss``; autograd records the function of anyflash behind it."""

    apply = staticmethod(cross_entropy_loss)


__getattr__ = absent(
    __name__,
    dict.fromkeys(
        ("cross_entropy_fwd_kernel", "cross_entropy_bwd_kernel"),
        "a Triton kernel; cross_entropy_loss of this module computes it on every device",
    ),
)
