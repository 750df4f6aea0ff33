"""The files for C++ that the package brings, and the word that the build left. Needs no torch."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any, NoReturn

FOLDER = pathlib.Path(__file__).resolve().parent
LIBRARY = FOLDER / "libanyflash_ops.so"
KERNELS = FOLDER / "libanyflash_kernels.so"  # the core and the kernels; LIBRARY opens it
CMAKE = FOLDER / "cmake"

#: The options of `python -m anyflash` that name a file.
OPTIONS = {"--cmake-dir": CMAKE, "--library": LIBRARY}


def build_facts() -> dict[str, Any]:
    """Word that the build left: binary, cuda, reasons for what is missing, and in a wheel the
    checksums (crc32) of the libraries; or nothing."""
    try:
        return json.loads((FOLDER / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


def why_not_built() -> str:
    """Why a library is missing, by the word that the build left."""
    facts = build_facts()
    if "reasons" not in facts:
        return f"{FOLDER} holds only a part of the package, as frozen or zipped ones do"
    told = (reason for reason in facts["reasons"] if not reason.startswith("cuda:"))
    return "; ".join(told) or "the file was there when anyflash was installed"


def answer(option: str) -> NoReturn:
    """Prints the path that an option of `python -m anyflash` asks for, and ends the program; with
    a reason and status 1 where this installation does not have it."""
    path = OPTIONS[option]
    if not path.exists():
        sys.exit(f"anyflash: {path.name} is not there: {why_not_built()}")
    print(path)
    sys.exit()
