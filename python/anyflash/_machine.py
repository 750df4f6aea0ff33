"""Facts about this machine and this build, for `doctor` and `info`: driver, GPUs, library files. Nothing here raises."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
LIBRARIES = ("libanyflash_ops.so", "libanyflash_kernels.so")


def driver() -> dict[str, Any] | None:
    """The NVIDIA driver: {"cuda": newest CUDA it knows, "devices": GPUs it sees}; None where there is none.

    Asks libcuda and not torch: torch cannot say whether it is the driver or itself that is missing.
    """
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            cuda = ctypes.CDLL(name)
        except OSError:
            continue
        version, devices = ctypes.c_int(0), ctypes.c_int(0)
        cuda.cuDriverGetVersion(ctypes.byref(version))
        if cuda.cuInit(0) == 0:
            cuda.cuDeviceGetCount(ctypes.byref(devices))
        text = f"{version.value // 1000}.{version.value % 1000 // 10}" if version.value else None
        return {"cuda": text, "devices": devices.value}
    return None


def gpus() -> list[dict[str, Any]]:
    """The GPUs torch sees: index, name, sm, memory_gib, torch_archs, supported_by_torch."""
    if not torch.cuda.is_available():
        return []
    archs = torch.cuda.get_arch_list()
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append({
            "index": index, "name": properties.name, "sm": properties.major * 10 + properties.minor,
            "memory_gib": properties.total_memory / 2**30, "torch_archs": archs,
            "supported_by_torch": not archs or runs_on(archs, properties.major, properties.minor),
        })  # fmt: skip
    return found


def runs_on(archs: list[str], major: int, minor: int) -> bool:
    """Whether code built for archs ("sm_80", "sm_90a", "compute_90") runs on a GPU of capability major.minor."""
    for arch in archs:
        kind, _, number = arch.partition("_")
        if not (number := number.rstrip("af")).isdigit():
            continue
        built_major, built_minor = divmod(int(number), 10)
        same_family = built_major == major and built_minor <= minor
        if same_family or (kind == "compute" and (built_major, built_minor) <= (major, minor)):
            return True
    return False


def library_files() -> dict[str, dict[str, Any]]:
    """Per library of the build: present, path, bytes, damage (None or what is wrong with the file itself)."""
    files = {}
    for name in LIBRARIES:
        path = FOLDER / name
        present = path.is_file()
        files[name] = {
            "present": present, "path": str(path), "bytes": path.stat().st_size if present else 0,
            "damage": elf_damage(path) if present else None,
        }  # fmt: skip
    return files


def elf_damage(path: Path) -> str | None:
    """Says in words what is wrong with a shared library file, None if its headers and its length agree.

    The section table is the last thing in a linked file; a copy that broke off lacks it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(64)
    if size == 0:
        return "it is empty"
    if header[:4] != b"\x7fELF":
        return "it is no library for this system (wrong first bytes)"
    if len(header) < 64:
        return f"it broke off after {size} bytes"
    (section_offset,) = struct.unpack_from("<Q", header, 0x28)
    entry_size, entries = struct.unpack_from("<HH", header, 0x3A)
    expected = section_offset + entry_size * entries
    return f"it has {size} bytes of at least {expected}" if size < expected else None


def native_state() -> dict[str, Any]:
    """The introspection module: available, error, build facts (CUDA version, architectures) and compiled instances."""
    try:
        from . import _native
    except ImportError as error:
        return {"available": False, "error": str(error), "build": {}, "instances": []}
    return {
        "available": True,
        "error": None,
        "build": dict(_native.build_info()),
        "instances": list(_native.instances()),
    }
