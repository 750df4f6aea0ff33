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
    """The NVIDIA driver, or None: {"version": 12040, "cuda": the newest CUDA it knows ("12.4"),
    "devices": GPUs it sees}.

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
        return {"version": version.value, "cuda": text, "devices": devices.value}
    return None


def gpus() -> list[dict[str, Any]]:
    """The GPUs torch sees: device ("cuda:0", as torch names it), kind ("cuda", "hip", "mps",
    "xpu"), name, memory_gib, and of NVIDIA's sm, torch_archs, supported_by_torch."""
    found = []
    if torch.cuda.is_available():
        kind = "cuda" if torch.version.hip is None else "hip"
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpu = _gpu(kind, f"cuda:{index}", properties.name, properties.total_memory)
            found.append(gpu if kind == "hip" else {**gpu, **_nvidia(properties)})
    xpu = getattr(torch, "xpu", None)  # torch 2.3
    if xpu is not None and xpu.is_available():
        for index in range(xpu.device_count()):
            properties = xpu.get_device_properties(index)
            found.append(_gpu("xpu", f"xpu:{index}", properties.name, properties.total_memory))
    if torch.backends.mps.is_available():
        memory = getattr(getattr(torch, "mps", None), "recommended_max_memory", int)()  # torch 2.5
        found.append(_gpu("mps", "mps", "Apple GPU", memory))
    return found


def _gpu(kind: str, device: str, name: str, memory: int) -> dict[str, Any]:
    return {"device": device, "kind": kind, "name": name, "memory_gib": memory / 2**30}


def _nvidia(properties: Any) -> dict[str, Any]:
    archs = torch.cuda.get_arch_list()
    return {
        "sm": properties.major * 10 + properties.minor, "torch_archs": archs,
        "supported_by_torch": not archs or runs_on(archs, properties.major, properties.minor),
    }  # fmt: skip


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
