"""The CUDA compiler as Python packages, for machines without nvcc.

Every one is pinned: nvcc's own metadata asks for the others without versions, which would pair
this ptxas with a newer front end whose output it cannot read.

usage: cuda_pins.py          prints the packages, or nothing where this machine has a usable nvcc
       cuda_pins.py --root   prints the folder of the installed packages, or nothing
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys

PINS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]


OLDEST = (12, 0)  # knows all our architectures


def has_nvcc() -> bool:
    """Whether this machine has an nvcc that is new enough, or the user names one."""
    if os.environ.get("CUDACXX"):
        return True
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.path.join(home, "bin") for home in homes if home]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
    if nvcc is None:
        return False
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    return found is not None and tuple(map(int, found.groups())) >= OLDEST


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
