"""What importing costs, each in fresh interpreters."""

from __future__ import annotations

import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from benchmarks.measure import Row

import anyflash

PACKAGE = pathlib.Path(anyflash.__file__).parent

_IMPORT = """
import time
began = time.perf_counter()
import torch
torch_there = time.perf_counter()
import flash_attn
print(torch_there - began, time.perf_counter() - torch_there)
"""

_SITE = """
import site, sys, time
began = time.perf_counter()
site.addsitedir(sys.argv[1])
print(time.perf_counter() - began)
"""


def rows() -> Iterator[Row]:
    pairs = [_run(_IMPORT) for _ in range(9)]
    torch_ms, ours_ms = (1e3 * statistics.median(column) for column in zip(*pairs))
    yield Row.excess(
        "import torch, flash_attn over import torch (ms)", torch_ms + ours_ms, torch_ms, 50, "ms"
    )
    with_hook, without = _hook_seconds()
    yield Row.excess(
        "start-up hook: site folder with and without it (ms)",
        1e3 * with_hook,
        1e3 * without,
        1,
        "ms",
    )


def _hook_seconds() -> tuple[float, float]:
    """Seconds Python needs for a site folder that holds the hook, and for an empty one."""
    checkout = pathlib.Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        hooked, empty = pathlib.Path(folder, "hooked"), pathlib.Path(folder, "empty")
        hooked.mkdir()
        empty.mkdir()
        shutil.copy(checkout / "startup/anyflash.pth", hooked)
        shutil.copy(checkout / "python/_anyflash_dropin.py", hooked)
        (hooked / "anyflash").symlink_to(PACKAGE)
        times = [(_run(_SITE, str(hooked))[0], _run(_SITE, str(empty))[0]) for _ in range(31)]
    with_hook, without = zip(*times[1:])
    return statistics.median(with_hook), statistics.median(without)


def _run(program: str, *arguments: str) -> list[float]:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]
