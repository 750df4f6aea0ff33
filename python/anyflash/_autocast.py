"""Autocast as PyTorch's own attention and linear do it: the floating inputs of a call get one
dtype. It is the autocast dtype, or that of the call's key/value cache, which lies in memory of its
user and stays as it is. ALiBi slopes and sinks, one number for each head, stay as precise as they
are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._guards import is_any_autocast_enabled

_TAKES_DEVICE = hasattr(torch, "get_autocast_dtype")  # torch 2.4: is_autocast_enabled(device_type)


def is_enabled(x: Tensor) -> bool:
    """True under autocast for x's device."""
    if not is_any_autocast_enabled():
        return False
    device = x.device.type
    if _TAKES_DEVICE:
        is_known = device == "cpu" or device == "cuda" or torch.amp.is_autocast_available(device)
        return is_known and torch.is_autocast_enabled(device)
    if device == "cuda":
        return torch.is_autocast_enabled()
    return device == "cpu" and torch.is_autocast_cpu_enabled()


def _dtype(x: Tensor) -> torch.dtype:
    if _TAKES_DEVICE:
        return torch.get_autocast_dtype(x.device.type)
    return torch.get_autocast_gpu_dtype() if x.is_cuda else torch.get_autocast_cpu_dtype()


def cast(*tensors: Tensor | None, cache: Tensor | None = None) -> list[Any]:
    """Floating tensors in the dtype that autocast gives a call on the first one's device; fp64,
    bool and None stay.

    Args:
        tensors: the call's inputs without its cache.
        cache: what the call reads its keys from, where that is a cache.

    Returns:
        A tensor for each tensor, None for each None.
    """
    first = tensors[0]
    assert first is not None
    dtype = _dtype(first) if cache is None else cache.dtype

    def cast_one(x: Tensor | None) -> Tensor | None:
        if x is None or not x.is_floating_point() or x.dtype == torch.float64:
            return x
        return x.to(dtype)

    return [cast_one(x) for x in tensors]
