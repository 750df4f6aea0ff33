"""The CUDA kernels on the emulator, behind the Python operators: programs of tests/emulated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from support import REPOSITORY

LIBRARY = REPOSITORY / "build/install/tests/emulated/libkernels_on_emulator.so"


def run_emulated(program: str, *arguments: object, backend: str = "") -> Any:
    """What a program writes as JSON in its last line, with ANYFLASH_BACKEND set to `backend`."""
    if not LIBRARY.exists():
        pytest.skip("no kernels on the emulator: `make test-cpp` builds them")
    script = REPOSITORY / "tests/emulated" / program
    done = subprocess.run(
        [sys.executable, str(script), str(LIBRARY), *map(str, arguments)],
        env={**os.environ, "ANYFLASH_PROVIDER": "python", "ANYFLASH_BACKEND": backend},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
