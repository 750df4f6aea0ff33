"""The CUDA compiler as Python packages, for machines without nvcc.

Every one is pinned: nvcc's own metadata asks for the others without versions, which would pair
this ptxas with a newer front end whose output it cannot read.

usage: cuda_pins.py          prints the packages, or nothing where this machine has an nvcc
       cuda_pins.py --root   prints the folder of the installed packages, or nothing
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

PINS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]


def has_nvcc() -> bool:
    """Whether FindNvcc.cmake will find a compiler without the packages."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return bool(os.environ.get("CUDACXX") or shutil.which("nvcc")) or any(
        home and os.path.exists(os.path.join(home, "bin", "nvcc")) for home in homes
    )


def package_root() -> str | None:
    """The folder into which the installed packages unpack, if they are there."""
    spec = importlib.util.find_spec("nvidia")
    roots = (
        (os.path.join(base, "cu13") for base in (spec.submodule_search_locations or []))
        if spec
        else ()
    )
    return next((root for root in roots if os.path.exists(os.path.join(root, "bin", "nvcc"))), None)


if __name__ == "__main__":
    if "--root" in sys.argv:
        print(package_root() or "")
    elif not has_nvcc():
        print(*PINS)
