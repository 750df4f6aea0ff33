"""Where a kernel runs that Python launches: on torch's threads, or its current stream."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _core
from ._records import CpuThreads


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


@functools.cache
def _parallel_for() -> int | None:
    """Torch's threads as the kernels take them; None: there is no way to them."""
    torch_cpu = pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with contextlib.suppress(OSError):
        loaded = ctypes.CDLL(str(torch_cpu))
        with contextlib.suppress(AttributeError):  # torch 2.10 has the function
            return _address(loaded.torch_parallel_for)
        with contextlib.suppress(AttributeError):  # found in what torch is linked with
            gomp_parallel = _address(loaded.GOMP_parallel)
            return _core.loaded().anyflash_parallel_for_by_openmp(gomp_parallel)
    return None


def has_threads() -> bool:
    """Whether CPU kernels called from Python can use torch's threads."""
    return _parallel_for() is not None


@contextlib.contextmanager
def launch_on(x: Tensor) -> Iterator[Any]:
    """Where a kernel runs on x's device: torch's threads, or its current stream."""
    if x.is_cuda:
        with torch.cuda.device(x.device):
            yield torch.cuda.current_stream().cuda_stream
    else:
        yield ctypes.byref(CpuThreads(_parallel_for(), torch.get_num_threads()))


def run(name: str, instance: Any, x: Tensor, *records: ctypes.Structure | None) -> None:
    """Launches a kernel on x's device: ``anyflash_run_<name>`` of these records."""
    function = getattr(_core.loaded(), f"anyflash_run_{name}")
    with launch_on(x) as where:
        _core.raise_for(function(instance, *map(_core.reference, records), where))
