"""Facts about this machine and this build: driver, GPUs, library files. Nothing here raises."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import shlex
import urllib.parse
from pathlib import Path
from typing import Any

import torch

from . import _core, _loader

FOLDER = Path(__file__).resolve().parent
LIBRARIES = ("libanyflash_ops.so", "libanyflash_kernels.so")


def driver() -> dict[str, Any] | None:
    """The NVIDIA driver: {"cuda": newest CUDA it knows, "devices": GPUs it sees}, or None.

    Asks libcuda: torch cannot say whether the driver or itself is what is missing.
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
    """Whether code for archs ("sm_80", "compute_90") runs on a GPU of capability major.minor."""
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
    """Per library: present, path, bytes, damage (None, or what is wrong with the file)."""
    files = {}
    for name in LIBRARIES:
        path = FOLDER / name
        present = path.is_file()
        files[name] = {
            "present": present, "path": str(path), "bytes": path.stat().st_size if present else 0,
            "damage": _loader.damage(path) if present else None,
        }  # fmt: skip
    return files


def source() -> str:
    """Where to reinstall anyflash from: the checkout around it, or what pip noted; quoted for a
    shell."""
    checkout = FOLDER.parents[1]
    if (checkout / "setup.py").is_file():
        return shlex.quote(str(checkout))
    try:
        noted = importlib.metadata.distribution("anyflash").read_text("direct_url.json") or ""
        url = json.loads(noted)["url"]
    except (importlib.metadata.PackageNotFoundError, ValueError, KeyError):
        return "ANYFLASH-WHEEL-OR-FOLDER"
    return shlex.quote(
        urllib.parse.unquote(url[len("file://") :]) if url.startswith("file://") else url
    )


def kernel_state() -> dict[str, Any]:
    """The kernel library: available, error, build facts, compiled instances."""
    if _core.library is None:
        error = next((reason for reason in _loader.reasons if "kernels" in reason), "not loaded")
        return {"available": False, "error": error, "build": {}, "instances": []}
    build, instances = _core.build_info(), _core.instances()
    return {"available": True, "error": None, "build": build, "instances": instances}
