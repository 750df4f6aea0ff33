"""anyflash: the flash_attn that always imports and always runs."""

from __future__ import annotations

from typing import Any

from . import _loader
from ._version import __version__

if _loader.load() == "none":
    raise ImportError(f"anyflash has no operators: {'; '.join(_loader.reasons)}")

from . import _ops, backends  # noqa: E402  (after the operators exist)
from .attention import attention  # noqa: E402
from .backends import backend  # noqa: E402
from .explain import explain  # noqa: E402
from .fused_mlp import bias_activation, fused_mlp  # noqa: E402
from .kvcache import attention_kvcache  # noqa: E402
from .rotary import rotary  # noqa: E402

_ops.register()

__all__ = [
    "__version__",
    "attention",
    "attention_kvcache",
    "backend",
    "backends",
    "bias_activation",
    "decide",
    "explain",
    "fused_mlp",
    "rotary",
]


def decide(problem: dict[str, Any]) -> dict[str, Any]:
    """Which route runs a problem, and why those before it do not.

    Args:
        problem: plain data, as in csrc/problem.h: op, device, sm (of a GPU), isa (of a CPU),
            direction, dtype, head_dim, head_dim_v, features, torch_version, chain, explicit.

    Returns:
        ``{"route": str, "instance": str | None, "measured": dict | None, "reasons": [(route, text),
        ...]}``: the route, ``"none"`` if nothing runs; for the route ``"kernel"`` its name and its
        speed beside PyTorch's attention, where that has been measured.

    Raises:
        ValueError: names that do not exist.
    """
    if _loader.has_kernels():
        return _loader.native.decide(problem)
    from ._python_ops import dispatch

    return dispatch.decide(problem)
