"""custom_fwd and custom_bwd: the autograd.Functions of this package under autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

#: Whether torch has the decorators that take a device type (2.4); those of torch.cuda.amp are then
#: deprecated.
deprecated = hasattr(torch.amp, "custom_fwd")


def _device_type(arguments: tuple[Any, ...]) -> str:
    """The first tensor's device type, if autocast knows it."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            device_type = argument.device.type
            return device_type if torch.amp.is_autocast_available(device_type) else "cuda"
    return "cuda"


def custom_amp_decorator(dec: Callable[..., Any], cuda_amp_deprecated: bool) -> Callable[..., Any]:
    """torch's custom_fwd or custom_bwd for the device that a call's first tensor lies on.

    Upstream fixes the device to CUDA, so that a CPU's autocast is not seen.

    Args:
        dec: torch.amp.custom_fwd or custom_bwd, or those of torch.cuda.amp.
        cuda_amp_deprecated: dec takes ``device_type``; without it dec is returned, for CUDA alone.
    """
    if not cuda_amp_deprecated:
        return dec

    def decorator(function: Optional[Callable[..., Any]] = None, **options: Any) -> Any:
        """torch's decorator of the name, for the device that a call's first tensor lies on."""
        if function is None:
            return functools.partial(decorator, **options)
        decorated: dict[str, Callable[..., Any]] = {}

        @functools.wraps(function)
        def on_device(ctx: Any, *args: Any, **kwargs: Any) -> Any:
            device_type = _device_type(args)
            if device_type not in decorated:
                decorated[device_type] = dec(function, device_type=device_type, **options)
            return decorated[device_type](ctx, *args, **kwargs)

        return on_device

    return decorator


_amp = torch.amp if deprecated else torch.cuda.amp
custom_fwd = custom_amp_decorator(_amp.custom_fwd, deprecated)
custom_bwd = custom_amp_decorator(_amp.custom_bwd, deprecated)
