"""What to build on this machine and with which compiler: the binary with CUDA, without, or pure
Python.

A machine without a C++ compiler gets one from the package index: zig, which builds the kernels for
every Linux since glibc 2.17. The operators for LibTorch are left out there: exceptions pass from
them into libtorch, which only a compiler with libstdc++ can give; the Python operators call the
same kernels.

Environment:
    ANYFLASH_BUILD  0: pure Python; 1: the binary, and an error where it cannot be built; unset: the
                    binary if possible
    ANYFLASH_CUDA   0: no CUDA kernels; 1: with them, or an error; unset: where there is a GPU, if
                    possible
    ANYFLASH_MACHINE the processor family that the binary is for, x86_64 or aarch64; unset: this
                    machine's. zig compiles for another one
    ANYFLASH_WERROR 1: a compiler's warning is an error
"""

from __future__ import annotations

import glob
import importlib.util
import os
import platform
import shutil
import sys

ZIG = "ziglang>=0.17.1,<0.18"
_ZIG_MACHINES = ("x86_64", "aarch64")
_NO = ("0", "off", "no", "false")


def setting(name: str) -> bool | None:
    """An environment switch: True, False, or None when unset."""
    value = os.environ.get(name, "").strip().lower()
    return None if not value else value not in _NO


def machine() -> str:
    """The processor family that the binary is for."""
    return os.environ.get("ANYFLASH_MACHINE", "").strip() or platform.machine()


def is_crossed() -> bool:
    """Whether the binary is for another processor family than this machine's."""
    return machine() != platform.machine()


def host_compiler() -> str | None:
    """This machine's C++ compiler, which CMake will use, if there is one and it can be used."""
    if is_crossed():
        return None
    candidates = (
        [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    )
    return next(filter(None, map(shutil.which, candidates)), None)


def _named_compiler() -> str | None:
    """What CXX names, where it counts: it is a compiler for this machine."""
    return None if is_crossed() else os.environ.get("CXX")


def zig() -> list[str] | None:
    """The C++ compiler of the package ziglang as a command, if that is installed."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None or machine() not in _ZIG_MACHINES:
        return None
    program = os.path.join(os.path.dirname(spec.origin), "zig")
    return [program, "c++", "-target", f"{machine()}-linux-gnu.2.17"]


def _forbidden_reason() -> str | None:
    if setting("ANYFLASH_BUILD") is False:
        return "ANYFLASH_BUILD=0 asked for the pure-Python install"
    if not sys.platform.startswith("linux"):
        return f"the binary is built on Linux only, this is {platform.system()}"
    if is_crossed() and machine() not in _ZIG_MACHINES:
        return f"ANYFLASH_MACHINE: expected {' or '.join(_ZIG_MACHINES)}, got {machine()!r}"
    return None


def why_zig() -> str:
    """Why no other compiler is used."""
    where = f" for {machine()} on {platform.machine()}" if is_crossed() else ""
    return f"there was no g++ or clang++{where}"


def needs_zig() -> bool:
    """Whether ziglang is to be fetched: something shall be compiled and nothing here can."""
    unserved = host_compiler() is None and not _named_compiler() and zig() is None
    return unserved and _forbidden_reason() is None and machine() in _ZIG_MACHINES


def no_binary_reason() -> str | None:
    """Why no binary can or shall be built here; None if nothing speaks against it."""
    if reason := _forbidden_reason():
        return reason
    if host_compiler():
        return None
    if named := _named_compiler():
        return f"there is no C++ compiler {named}, which CXX names"
    if zig() is None:
        return "no C++ compiler (g++, clang++, or zig of the package ziglang) was found"
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
    if host_compiler() is None:
        return f"they are built with g++ or clang++, and {why_zig()}"
    if machine() not in ("x86_64", "aarch64"):
        return f"no CUDA compiler exists for {machine()}"
    return None if _has_gpu() else "there is no GPU here; ANYFLASH_CUDA=1 builds them all the same"


def announcement() -> str:
    """What the build does and how long it takes, before it begins."""
    if reason := no_binary_reason():
        return f"anyflash: nothing to compile: {reason}"
    cuda = no_cuda_reason() is None
    cores = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    # Measured: CPU minutes of a whole build.
    if host_compiler() is None:
        what, minutes = f"CPU kernels with zig ({why_zig()})", 1.7
    elif cuda:
        what, minutes = "operators and CPU and CUDA kernels", 11
    else:
        what, minutes = "operators and CPU kernels", 2.5
    return (
        f"anyflash: compiling {what} on {cores} cores, about {max(0.5, minutes / cores):.1f} "
        "minutes (pip shows nothing meanwhile; pip install -v does)"
    )


def announce() -> None:
    """Says it on the terminal: pip keeps what a build prints for itself."""
    try:
        with open("/dev/tty", "w") as terminal:
            print(f"\n{announcement()}", file=terminal)
    except OSError:  # nobody watches
        print(announcement(), flush=True)
