"""anyflash: the flash_attn that always imports and always runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ._version import __version__

try:
    import torch as _torch  # noqa: F401
except ImportError as _error:
    _text = f"anyflash needs PyTorch, which cannot be imported here: {_error}"
    if getattr(sys, "argv", None) and sys.argv[0] == "-m":  # python -m anyflash: an answer
        from . import _files

        if sys.argv[1:] and sys.argv[1] in _files.OPTIONS:  # for C++, whose LibTorch is no package
            _files.answer(sys.argv[1])
        from ._remedies import REMEDIES as _REMEDIES

        sys.exit(f"{_text}\nWhat to do: {_REMEDIES['install_torch'].text()[0]}")
    raise ImportError(_text, name=_error.name) from _error

from . import _core, _loader  # noqa: E402  (after torch is known to be here)

if _loader.load() == "none":
    raise ImportError(f"anyflash has no operators: {'; '.join(_loader.reasons)}")

from . import _flops, _ops, _sharding, backends  # noqa: E402  (after the operators exist)
from .attention import attention  # noqa: E402
from .backends import backend  # noqa: E402
from .cross_entropy import cross_entropy  # noqa: E402
from .explain import explain  # noqa: E402
from .fused_mlp import bias_activation, fused_mlp  # noqa: E402
from .kvcache import attention_kvcache  # noqa: E402
from .norm import layer_norm, rms_norm  # noqa: E402
from .rotary import rotary  # noqa: E402
from .sdpa import accelerate_from_environment, accelerate_sdpa  # noqa: E402

if TYPE_CHECKING:
    from ._doctor import Report

_ops.register()
_flops.register_operators()
_sharding.register_operators()
if backends.is_set("ANYFLASH_VERBOSE"):
    _loader.show_info()
accelerate_from_environment()

__all__ = [
    "__version__",
    "accelerate_sdpa",
    "attention",
    "attention_kvcache",
    "backend",
    "backends",
    "bias_activation",
    "cross_entropy",
    "decide",
    "doctor",
    "explain",
    "fused_mlp",
    "rotary",
    "layer_norm",
    "rms_norm",
]


def doctor(probe: bool = True) -> Report:
    """What is installed, what will run, and what to do about each problem.

    Args:
        probe: also try to import other flash_attn copies (a second or two each).

    Returns:
        The report, whose ``repr`` is the text of ``python -m anyflash doctor``; ``as_dict()`` and
        ``healthy`` are for programs.
    """
    from ._doctor import diagnose

    return diagnose(probe)


def decide(problem: dict[str, Any]) -> dict[str, Any]:
    """Which route runs a problem, and why those before it do not.

    Args:
        problem: plain data, as in core/problem.h: op, device, sm (of a GPU), driver (the CUDA that
            NVIDIA's driver knows, 12040 = 12.4), isa (of a CPU), isa_lowered (by ANYFLASH_CPU_ISA),
            direction, dtype, head_dim, head_dim_v, features, torch_version, order, explicit.

    Returns:
        A dictionary: ``route``, ``"none"`` if nothing runs; for the route ``"kernel"`` its name as
        ``instance`` (else None) and ``measured``, its speed beside PyTorch's attention as a
        dictionary, None where nobody has measured it; ``reasons``, pairs of a route before that one
        and a text.

    Raises:
        ValueError: names that do not exist.
    """
    if _loader.has_kernels():
        return _core.decide(problem)
    from ._python_ops import without_core

    return without_core.decide(problem)
