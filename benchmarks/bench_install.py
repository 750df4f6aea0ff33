"""The isolated `pip install .` of a clean copy beside an installed torch, and its wheel."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import torch
from benchmarks.measure import Row

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        _clean_copy(folder / "source")
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        python = folder / "venv/bin/python"
        _show_torch(python)
        began = time.perf_counter()
        _pip(python, "wheel", "--no-deps", "-w", str(folder), str(folder / "source"))
        (wheel,) = folder.glob("anyflash-*.whl")
        _pip(python, "install", str(wheel))
        seconds = time.perf_counter() - began
        yield Row.limit("pip install . with torch present (s)", seconds, 90, "s")
        yield Row.limit("wheel (MB)", wheel.stat().st_size / 1e6, 5, "MB")


def _clean_copy(target: pathlib.Path) -> None:
    """The files git knows or would add, so that no earlier build helps."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (CHECKOUT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CHECKOUT / name, target / name)


def _show_torch(python: pathlib.Path) -> None:
    """Puts this environment's packages on the new one's path: torch is present, not copied."""
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    packages = pathlib.Path(torch.__file__).resolve().parent.parent
    pathlib.Path(done.stdout.strip(), "bench.pth").write_text(f"{packages}\n")


def _pip(python: pathlib.Path, *arguments: str) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
