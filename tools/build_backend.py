"""setuptools' build backend, which also asks for what this machine lacks.

That is cmake, ninja, a C++ compiler where there is none, and pip, which fetches what is needed in
parts or in two versions: torch's headers (torch_headers.py; never torch) and CUDA's compiler
(nvrtc.py).
"""

from __future__ import annotations

import importlib.util
import re
import subprocess

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

import torch_headers
from build_plan import ZIG, announce, host_compiler, needs_zig, no_binary_reason, no_cuda_reason

OLDEST_CMAKE = (3, 24)


def _version(tool: str) -> tuple[int, ...]:
    try:
        text = subprocess.run(
            [tool, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ()
    found = re.search(r"(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else ()


def _missing_tools() -> list[str]:
    missing = [ZIG] if needs_zig() else []
    if no_binary_reason() and not missing:
        return []
    if _version("cmake") < OLDEST_CMAKE:
        missing.append("cmake>=3.24")
    if not _version("ninja"):
        missing.append("ninja")
    fetches = not no_cuda_reason() or (host_compiler() and torch_headers.find() is None)
    if fetches and importlib.util.find_spec("pip") is None:
        missing.append("pip")
    return missing


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _missing_tools()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _missing_tools()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    announce()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    announce()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
