"""Where a kernel runs that Python launches: on torch's threads, or its current stream."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _core
from ._records import CpuThreads


def _openmp_library() -> pathlib.Path | None:
    """The OpenMP runtime that torch has brought into the process."""
    try:
        maps = pathlib.Path("/proc/self/maps").read_text()
    except OSError:
        return None
    for name in ("libgomp", "libiomp5", "libomp"):
        match = re.search(rf"\s(/\S*{name}\S*\.so\S*)$", maps, re.MULTILINE)
        if match:
            return pathlib.Path(match.group(1))
    return None


@functools.cache
def _parallel_for() -> int | None:
    """Torch's threads as the kernels take them; None: there is no way to them."""
    torch_cpu = pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with contextlib.suppress(OSError, AttributeError):  # torch 2.10 has the function
        function = ctypes.CDLL(str(torch_cpu)).torch_parallel_for
        return ctypes.cast(function, ctypes.c_void_p).value
    with contextlib.suppress(OSError, AttributeError):
        path = _openmp_library()
        if path is not None:
            gomp = ctypes.CDLL(str(path)).GOMP_parallel
            return _core.loaded().anyflash_parallel_for_by_openmp(
                ctypes.cast(gomp, ctypes.c_void_p)
            )
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
