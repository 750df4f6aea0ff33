"""Autocast as PyTorch's own attention and linear do it: fp32 inputs become the autocast dtype."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

_TAKES_DEVICE = hasattr(torch, "get_autocast_dtype")  # torch 2.4: is_autocast_enabled(device_type)
# A cheap first look: None of the devices is under autocast.
_any_enabled = getattr(torch._C, "_is_any_autocast_enabled", None)


def is_enabled(x: Tensor) -> bool:
    """True under autocast for x's device."""
    if _TAKES_DEVICE:
        return torch.is_autocast_enabled(x.device.type)
    return torch.is_autocast_enabled() if x.is_cuda else torch.is_autocast_cpu_enabled()


def _dtype(x: Tensor) -> torch.dtype:
    if _TAKES_DEVICE:
        return torch.get_autocast_dtype(x.device.type)
    return torch.get_autocast_gpu_dtype() if x.is_cuda else torch.get_autocast_cpu_dtype()


def cast(*tensors: Optional[Tensor]) -> list[Optional[Tensor]]:
    """Floating tensors in the autocast dtype of the first one's device; fp64, bool and None stay."""
    first = tensors[0]
    assert first is not None
    dtype = _dtype(first)

    def cast_one(x: Optional[Tensor]) -> Optional[Tensor]:
        if x is None or not x.is_floating_point() or x.dtype == torch.float64:
            return x
        return x.to(dtype)

    return [cast_one(x) for x in tensors]
