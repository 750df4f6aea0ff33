"""A device that is neither "cpu" nor "cuda", for tests: stand_in_device.cpp, built and loaded.

PyTorch takes such a device once in a process, and before the first backward there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch
from tree import REPOSITORY

NAME = "standin"
SOURCE = Path(__file__).with_suffix(".cpp")
# Kept between runs: PyTorch's headers take half a minute to compile.
FOLDER = REPOSITORY / "out/stand_in_device"


def why_not() -> str | None:
    """Why this environment has no such device."""
    if torch.__version__.split(".")[:2] != ["2", "13"]:
        return f"the stand-in device is written for torch 2.13, this is {torch.__version__}"
    if _compiler() is None:
        return "no C++ compiler for the stand-in device"
    return None


def _compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


def build() -> Path:
    """The library, compiled against the running torch."""
    from torch.utils.cpp_extension import include_paths, library_paths

    state = SOURCE.read_bytes() + torch.__version__.encode() + torch.__file__.encode()
    library = FOLDER / f"{hashlib.sha256(state).hexdigest()[:16]}.so"
    if library.exists():
        return library
    FOLDER.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-w"]
    flags += [f"-I{path}" for path in [*include_paths(), sysconfig.get_paths()["include"]]]
    links = [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-lc10"]
    command = [str(_compiler()), *flags, str(SOURCE), "-o", str(unfinished), *links]
    subprocess.run(command, check=True)
    unfinished.rename(library)
    return library


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
