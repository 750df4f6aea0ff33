"""Autocast as PyTorch's own attention and linear do it: fp32 inputs become the autocast dtype."""

from __future__ import annotations

import torch
from torch import Tensor

_TAKES_DEVICE = hasattr(torch, "get_autocast_dtype")  # torch 2.4: is_autocast_enabled(device_type)


def is_enabled(x: Tensor) -> bool:
    """True under autocast for x's device."""
    if _TAKES_DEVICE:
        device = x.device.type
        return (device == "cpu" or device == "cuda") and torch.is_autocast_enabled(device)
    return torch.is_autocast_enabled() if x.is_cuda else torch.is_autocast_cpu_enabled()


def _dtype(x: Tensor) -> torch.dtype:
    if _TAKES_DEVICE:
        return torch.get_autocast_dtype(x.device.type)
    return torch.get_autocast_gpu_dtype() if x.is_cuda else torch.get_autocast_cpu_dtype()


def cast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Floating tensors in the autocast dtype of the first one's device; fp64, bool and None
    stay."""
    first = tensors[0]
    assert first is not None
    dtype = _dtype(first)

    def cast_one(x: Tensor | None) -> Tensor | None:
        if x is None or not x.is_floating_point() or x.dtype == torch.float64:
            return x
        return x.to(dtype)

    return [cast_one(x) for x in tensors]
