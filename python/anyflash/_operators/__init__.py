"""What an operator has in Python whichever provider runs, one module per family. A family has

- ``FAKES``: operator name -> shapes, dtypes and strides of the results alone
- ``DIFFERENTIABLE``: operator name -> the operator as autograd records it

and all of them have rules for torch.vmap (vmap.py).

Rotary, norm and cross entropy have kernels for CPUs only (core/, kernels/cpu/). Everything else of
them runs as PyTorch operations, written once, here, for both providers:

- ``MATH``: operator name -> the same in PyTorch operations, for devices and dtypes without a kernel
- ``KERNELS``: operator name -> the same by the core, for the CPU key of the Python provider

The public function (anyflash/rotary.py, ...) calls the operator where ``runs_on_kernel`` says so,
and else the family's math, which autograd differentiates by itself. What cannot be computed the
core refuses, for both.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _core, _records, backends
from .._autograd import in_plain_eager, is_compiling


@functools.cache
def _is_kernel(family: str, device: torch.device, dtype: torch.dtype, backend: int) -> bool:
    """A choice, made and told once: what it depends on stays as it is in a process."""
    if _core.library is None:
        from .._python_ops import without_core

        without_core.choose(family, backend)
        return False
    return _core.choose(family, device, dtype, backend).route == "kernel"


def _choose_kernel(family: str, device: torch.device, dtype: torch.dtype) -> bool:
    return _is_kernel(family, device, dtype, backends.current_code())


# torch.compile evaluates it while it traces and keeps the result, as it does for attention.
_choose_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def runs_on_kernel(family: str, x: Tensor) -> bool:
    """Whether a call on tensors like ``x`` goes to the operator; else it is the family's math.

    ``kernel`` counts where it is the first name of the order of back ends; every other name means
    math here. A fallback is said once.

    Raises:
        RuntimeError: no kernel can run, and the order names nothing else.
    """
    # The math refuses all other dtypes: no fallback to tell.
    return x.dtype.is_floating_point and _choose_kernel(family, x.device, x.dtype)


_PLAIN = (Tensor, torch.nn.Parameter)


def can_check(*tensors: Any) -> bool:
    """Whether the core can check a call: not without it, and not while a graph is traced, whose
    sizes may be symbols. Else ``expect`` has to do."""
    if _core.library is None or is_compiling():
        return False
    given = (x for x in tensors if isinstance(x, Tensor) and type(x) not in _PLAIN)
    return all(type(size) is int for x in given for size in x.shape)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Of sums over x: log-sum-exp, mean, rstd."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def record_of(kind: type[Any], tensors: Mapping[str, Tensor | None], **options: Any) -> Any:
    """The arguments of a call as the core sees them.

    Raises:
        RuntimeError: an integer that 64 bits do not hold.
    """
    record, has_memory = _records.new(kind), in_plain_eager()
    for name, x in tensors.items():
        if x is None:
            continue
        # A tensor of autograd.grad(is_grads_batched=True) has none, and looks like any other.
        if has_memory and type(x) in _PLAIN and torch._C._has_storage(x):
            _records.put(record, name, x)
        else:
            _records.put_shape(record, name, x)
    for name, value in options.items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise RuntimeError(f"{name}: expected a number of 64 bits, got {value}")
        setattr(record, name, value)
    return record


def check(family: str, *records: Any) -> None:
    """Has the core check a call.

    Raises:
        RuntimeError: what cannot be computed.
    """
    _core.prepare(family, *records, finds_kernel=False)


def expect(condition: bool, name: str, *tensors: Tensor | None) -> None:
    """What the math cannot do without, where the core has not looked: broadcasting would go on with
    shapes that do not fit.

    Raises:
        RuntimeError: the condition does not hold.
    """
    if not condition:
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors if x is not None)
        raise RuntimeError(f"{name}: expected what fits the other arguments, got {shapes}")
