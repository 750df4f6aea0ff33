"""Rows whose log-sum-exp is far from 0: as one float it says where their logits lie, and no more
how much their weights add up to. A backward through them adds the weights up again."""

from __future__ import annotations

import torch
from torch import Tensor

# From here on the rounding of a log-sum-exp (2^-24 of it, in fp64 2^-53) is no longer small beside
# the logarithm of a sum.
_FAR, _FAR_DOUBLE = 2.0**14, 2.0**43


def far_rows(lse: Tensor) -> Tensor | None:
    """Where that is so, with lse's shape; None where no row is far, as long as that can be told
    without waiting for a device."""
    size = lse.abs()
    limit = _FAR_DOUBLE if lse.dtype == torch.float64 else _FAR
    far = (size >= limit) & (size < float("inf"))
    return None if lse.device.type == "cpu" and not far.any() else far


def weight_of_far_rows(far: Tensor, total: Tensor, reference: Tensor, lse: Tensor) -> Tensor:
    """1 / the sum of a far row's weights exp(logit - reference), 1 of the others. A log-sum-exp
    that is larger by more than rounding has other keys in it, which these are nothing beside."""
    beyond = reference + total.log() < lse - lse.abs() * 2.0**-12
    return torch.where(far, total.masked_fill(beyond, float("inf")).reciprocal(), 1.0)
