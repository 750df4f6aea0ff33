"""C++ of the tests, compiled against the running torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch
from tree import REPOSITORY

INCLUDE = REPOSITORY / "include"
# Kept between runs: PyTorch's headers take long to compile.
FOLDER = REPOSITORY / "out/cpp_builds"


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


def compiled(source: Path, *flags: str) -> Path:
    """What the compiler makes of the source with these flags, linked to libtorch_cpu alone."""
    from torch.utils.cpp_extension import include_paths, library_paths

    headers = b"".join(path.read_bytes() for path in sorted(INCLUDE.rglob("*.h")))
    state = source.read_bytes() + headers + f"{torch.__version__}{torch.__file__}{flags}".encode()
    product = FOLDER / f"{source.stem}-{hashlib.sha256(state).hexdigest()[:16]}"
    if product.exists():
        return product
    FOLDER.mkdir(parents=True, exist_ok=True)
    unfinished = product.with_suffix(f".{os.getpid()}")
    folders = [*include_paths(), sysconfig.get_paths()["include"]]
    command = [str(compiler()), "-O1", "-std=c++20", *flags, f"-I{INCLUDE}"]
    command += [f"-isystem{folder}" for folder in folders]
    command += [str(source), "-o", str(unfinished)]
    for folder in library_paths():
        command += [f"-L{folder}", f"-Wl,-rpath,{folder}"]
    command += ["-ltorch_cpu", "-lc10", "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    unfinished.rename(product)
    return product


def shared_library(source: Path, *flags: str) -> Path:
    return compiled(source, "-shared", "-fPIC", *flags)
