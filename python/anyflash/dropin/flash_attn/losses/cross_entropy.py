"""Cross entropy loss as a module; upstream's takes CUDA tensors only, this one any."""

from __future__ import annotations

from typing import Any, Optional, Union

from torch import Tensor, nn

from ..ops.triton.cross_entropy import cross_entropy_loss


class CrossEntropyLoss(nn.Module):
    """Cross entropy over the last dimension of (rows, vocab) logits.

    Args:
        ignore_index: Label of rows whose loss and gradient are 0.
        reduction: "mean" over the rows that are not ignored (NaN if all are), "sum" or "none".
        label_smoothing: Share of the loss that is spread over all classes.
        logit_scale: Factor of the logits.
        lse_square_scale: Weight of the z-loss, the square of the log-sum-exp.
        inplace_backward: The gradient overwrites the logits.
        process_group: The vocabulary is split over its processes.
        return_z_loss: The result is (loss, z_loss); z_loss is contained in loss and has no
            gradient.

    Raises:
        NotImplementedError: Another reduction.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "none", "sum"):
            raise NotImplementedError(
                f"Only support reduction = 'mean' or 'none' or 'sum', got {reduction!r}"
            )
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def _reduced(self, losses: Tensor, target: Tensor) -> Tensor:
        if self.reduction == "none":
            return losses
        total = losses.sum()
        return total if self.reduction == "sum" else total / (target != self.ignore_index).sum()

    def forward(
        self, input: Tensor, target: Tensor, precomputed_lse: Optional[Tensor] = None
    ) -> Union[Tensor, tuple[Tensor, Tensor]]:
        """The loss, fp32: a scalar, or (rows,) without a reduction.

        Args:
            input: (rows, vocab) logits.
            target: (rows,) labels.
            precomputed_lse: (rows,) fp32, the log-sum-exp of the logits.
        """
        losses, z_losses = cross_entropy_loss(
            input,
            target,
            precomputed_lse=precomputed_lse,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            lse_square_scale=self.lse_square_scale,
            ignore_index=self.ignore_index,
            inplace_backward=self.inplace_backward,
            process_group=self.process_group,
        )
        loss = self._reduced(losses, target)
        return (loss, self._reduced(z_losses, target)) if self.return_z_loss else loss
