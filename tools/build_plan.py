"""What to build on this machine: the binary with CUDA, without, or pure Python.

Environment:
    ANYFLASH_BUILD  0: pure Python; 1: the binary, and an error where it cannot be built; unset:
    the binary if possible ANYFLASH_CUDA   0: no CUDA kernels; 1: an error where they cannot be
    built; unset: if possible
"""

from __future__ import annotations

import os
import platform
import shutil
import sys

_NO = ("0", "off", "no", "false")


def setting(name: str) -> bool | None:
    """An environment switch: True, False, or None when unset."""
    value = os.environ.get(name, "").strip().lower()
    return None if not value else value not in _NO


def compiler() -> str | None:
    """The C++ compiler that CMake will use, if there is one."""
    candidates = (
        [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    )
    return next(filter(None, map(shutil.which, candidates)), None)


def no_binary_reason() -> str | None:
    """Why no binary can or shall be built here; None if nothing speaks against it."""
    if setting("ANYFLASH_BUILD") is False:
        return "ANYFLASH_BUILD=0 asked for the pure-Python install"
    if not sys.platform.startswith("linux"):
        return f"the binary is built on Linux only, this is {platform.system()}"
    if compiler() is None:
        return "no C++ compiler (g++ or clang++) was found"
    return None


def wants_cuda() -> bool:
    """Whether the CUDA kernels shall be built: their compiler exists for x86-64 and ARM64."""
    asked = setting("ANYFLASH_CUDA")
    return platform.machine() in ("x86_64", "aarch64") if asked is None else asked
