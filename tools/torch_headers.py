"""Finds torch's stable-ABI headers without importing torch.

Order: $ANYFLASH_TORCH_INCLUDE; the torch this Python would import; the one in its site-packages
(inside pip's isolated build the former is hidden, the latter is the user's); else the headers are
taken out of torch's macOS wheel, the smallest one: the headers are the same on every system.
Which torch they come from does not matter: the library is built for torch 2.10's ABI.

usage: torch_headers.py [<folder for downloaded headers>]
prints the include folder; exit status 1 where there is none
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator

OLDEST = (2, 10)
WHEEL = "torch==2.12.1"
PARTS = (
    "torch/csrc/stable/",
    "torch/csrc/inductor/aoti_torch/c/",
    "torch/csrc/inductor/aoti_torch/generated/",
    "torch/headeronly/",
)


def version(include: pathlib.Path) -> tuple[int, int]:
    """Version of the torch whose include folder this is; (0, 0) without stable-ABI headers."""
    try:
        text = (include / "torch/headeronly/version.h").read_text()
    except OSError:
        return (0, 0)
    found = dict(re.findall(r"#define TORCH_VERSION_(MAJOR|MINOR) (\d+)", text))
    return (int(found.get("MAJOR", 0)), int(found.get("MINOR", 0)))


def installed() -> Iterator[pathlib.Path]:
    if "ANYFLASH_TORCH_INCLUDE" in os.environ:
        yield pathlib.Path(os.environ["ANYFLASH_TORCH_INCLUDE"])
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        yield pathlib.Path(folder) / "include"
    yield pathlib.Path(sysconfig.get_paths()["purelib"]) / "torch/include"


def download(folder: pathlib.Path) -> pathlib.Path:
    """Unpacks the headers of WHEEL into a folder (kept for the next build) and returns it."""
    if version(folder) >= OLDEST:
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            scratch,
        ]
        command += ["--platform", "macosx_14_0_arm64", "--python-version", "3.12", WHEEL]
        subprocess.run(command, check=True, stdout=sys.stderr)
        with zipfile.ZipFile(next(pathlib.Path(scratch).glob("torch-*.whl"))) as wheel:
            for member in wheel.namelist():
                name = member.partition("torch/include/")[2]
                if name.startswith(PARTS) and name.endswith(".h"):
                    target = folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(wheel.read(member))
    return folder


def find() -> pathlib.Path | None:
    """The include folder of an installed torch that is new enough, if any."""
    return next((include for include in installed() if version(include) >= OLDEST), None)


def main() -> int:
    include = find()
    if include is None and len(sys.argv) > 1:
        try:
            include = download(pathlib.Path(sys.argv[1]))
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            print(
                f"no torch >= 2.10 is installed and its headers could not be downloaded: {error}",
                file=sys.stderr,
            )
    if include is None:
        return 1
    print(include)
    return 0


if __name__ == "__main__":
    sys.exit(main())
