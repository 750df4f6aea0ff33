"""The demo's language model, trained on the CUDA kernels: they, the decision, the operators and
autograd together, on the emulator."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support import REPOSITORY

LIBRARY = REPOSITORY / "build/dev/tests/emulated/libkernels_on_emulator.so"
STEPS = 60


def losses(backend: str) -> list[float]:
    script = REPOSITORY / "tests/emulated/training.py"
    done = subprocess.run(
        [sys.executable, str(script), str(LIBRARY), str(STEPS)],
        env={**os.environ, "ANYFLASH_PROVIDER": "python", "ANYFLASH_BACKEND": backend},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_a_language_model_trains_on_the_kernels_for_gpus():
    pytest.importorskip("tqdm")
    if not LIBRARY.exists():
        pytest.skip("no kernels on the emulator: `make test-cpp` builds them")
    kernels, math = losses("kernel,math"), losses("math")
    assert len(kernels) == STEPS
    assert kernels != math  # what ran is another implementation
    assert max(abs(a - b) for a, b in zip(kernels, math)) < 0.02
    assert kernels[-1] < 0.8 * kernels[0]
