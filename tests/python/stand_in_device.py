"""A device that is neither "cpu" nor "cuda", for tests: stand_in_device.cpp, built and loaded.

PyTorch takes such a device once in a process, and before the first backward there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from pathlib import Path

import cpp_builds
import torch

NAME = "standin"
SOURCE = Path(__file__).with_suffix(".cpp")


def why_not() -> str | None:
    """Why this environment has no such device."""
    if torch.__version__.split(".")[:2] != ["2", "13"]:
        return f"the stand-in device is written for torch 2.13, this is {torch.__version__}"
    if cpp_builds.compiler() is None:
        return "no C++ compiler for the stand-in device"
    return None


def build() -> Path:
    """The library, compiled against the running torch."""
    return cpp_builds.shared_library(SOURCE, "-w")


class _Module:
    """torch.standin: what PyTorch asks of the module of a device."""

    class device(contextlib.nullcontext):  # noqa: N801
        """There is one."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    # Random numbers are the CPU's.
    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def get_rng_state(device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


@functools.cache
def load() -> ctypes.CDLL:
    """Makes the device known to this process."""
    library = build()
    torch.ops.load_library(str(library))
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _Module)
    loaded = ctypes.CDLL(str(library))
    loaded.stand_in_host_reads.restype = loaded.stand_in_sdpa_calls.restype = ctypes.c_int64
    return loaded


def host_reads() -> int:
    """How often the host has waited for a value of the device until now."""
    return load().stand_in_host_reads()


def sdpa_calls() -> int:
    """How often PyTorch's public attention was called until now."""
    return load().stand_in_sdpa_calls()
