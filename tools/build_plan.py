"""What to build on this machine: the binary with CUDA, without, or pure Python.

Environment:
    ANYFLASH_BUILD  0: pure Python; 1: the binary, and an error where it cannot be built; unset: the
                    binary if possible
    ANYFLASH_CUDA   0: no CUDA kernels; 1: with them, or an error; unset: where there is a GPU, if
                    possible
    ANYFLASH_WERROR 1: a compiler's warning is an error
"""

from __future__ import annotations

import glob
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


def _has_gpu() -> bool:
    """Whether an NVIDIA driver shows a GPU: on Linux, on WSL, on Jetson."""
    return any(map(glob.glob, ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/nvhost-gpu")))


def no_cuda_reason() -> str | None:
    """Why no CUDA kernels shall be built; None if nothing speaks against them."""
    asked = setting("ANYFLASH_CUDA")
    if asked is False:
        return "ANYFLASH_CUDA=0 asked for none"
    if asked:
        return None
    if platform.machine() not in ("x86_64", "aarch64"):
        return f"no CUDA compiler exists for {platform.machine()}"
    return None if _has_gpu() else "there is no GPU here; ANYFLASH_CUDA=1 builds them all the same"


def announcement() -> str:
    """What the build does and how long it takes, before it begins."""
    if reason := no_binary_reason():
        return f"anyflash: nothing to compile: {reason}"
    cuda = no_cuda_reason() is None
    cores = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    minutes = max(0.5, (5.5 if cuda else 2.5) / cores)  # measured: CPU minutes of a whole build
    what = "CPU and CUDA kernels" if cuda else "CPU kernels"
    return (
        f"anyflash: compiling operators and {what} on {cores} cores, about {minutes:.1f} minutes "
        "(pip shows nothing meanwhile; pip install -v does)"
    )


def announce() -> None:
    """Says it on the terminal: pip keeps what a build prints for itself."""
    try:
        with open("/dev/tty", "w") as terminal:
            print(f"\n{announcement()}", file=terminal)
    except OSError:  # nobody watches
        print(announcement(), flush=True)
