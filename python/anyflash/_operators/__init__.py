"""The operators around attention, one module per family: rotary, norm, cross_entropy.

Their kernels are for CPUs so far (csrc/, kernels/cpu/). Everything else runs as PyTorch operations,
written once, in Python, for both providers. A family has

- ``MATH``: operator name -> the same in PyTorch operations, for devices and dtypes without a kernel
- ``FAKES``: operator name -> shapes, dtypes and strides of the results alone
- ``DIFFERENTIABLE``: operator name -> the operator as autograd records it

The public function (anyflash/rotary.py, ...) checks its arguments, then calls the operator where
``runs_on_kernel`` says so, and else the family's math, which autograd differentiates by itself.
"""

from __future__ import annotations

import functools
import logging
import os

import torch
from torch import Tensor

from .. import _loader, backends

_LOGGER = logging.getLogger("anyflash")
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def obstacle_to_kernel(x: Tensor) -> str | None:
    """Why no kernel can take a tensor like ``x``; None: one can."""
    if x.device.type != "cpu":
        return f"this build has no kernel of this operator for {x.device.type}"
    if x.dtype not in _KERNEL_DTYPES:
        return f"no kernel takes {str(x.dtype).removeprefix('torch.')}"
    if not _loader.has_kernels():
        return "the Python operators have none"
    if _loader.cpu_isa() == "none":
        return "this CPU has no instruction set of a kernel, or ANYFLASH_CPU_ISA switched it off"
    return None


@functools.cache
def _environment_chain(backend: str | None, strict: str | None) -> tuple[str, ...]:
    """backends.environment_chain, remembered for the two variables that it reads."""
    return backends.environment_chain()


def _chain() -> tuple[str, ...]:
    code = backends.current_code()
    if code != 0:
        return backends.chain_names(code)
    environment = os.environ
    return _environment_chain(
        environment.get("ANYFLASH_BACKEND"), environment.get("ANYFLASH_STRICT")
    )


@functools.cache
def _tell(family: str, obstacle: str) -> None:
    """Says once that a family does not run on a kernel."""
    _LOGGER.warning(
        "%s",
        f"anyflash: {family} runs on plain PyTorch operators (math), because kernel: {obstacle}. "
        'To choose it yourself: with anyflash.backend("math"). To make it an error: '
        "ANYFLASH_STRICT=1. This is said once.",
    )


def runs_on_kernel(family: str, x: Tensor) -> bool:
    """Whether a call on tensors like ``x`` goes to the operator; else it is the family's math.

    ``kernel`` counts where it is the first name of the order of back ends; every other name means
    math here. A fallback is said once.

    Raises:
        RuntimeError: no kernel can run, and the order names nothing else.
    """
    chain = _chain()
    if chain[0] != "kernel":
        return False
    obstacle = obstacle_to_kernel(x)
    if obstacle is None:
        return True
    if len(chain) == 1:
        raise RuntimeError(f'anyflash: no back end of "kernel" can run this {family}: {obstacle}')
    if x.dtype.is_floating_point:  # the math refuses all others
        _tell(family, obstacle)
    return False


# torch.compile evaluates it while it traces and keeps the result, as it does for attention.
runs_on_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]
