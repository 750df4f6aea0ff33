"""A device without kernels and routes of our own, and no GPU: a stand-in of PyTorch's for it.

The tests of the other files run on it, in a process of its own, and with them what is to be checked
there alone.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import stand_in_device
from tree import REPOSITORY

pytestmark = pytest.mark.providers

FILES = {
    "attention": ("stand_in_checks", "test_forward", "test_backward", "test_key_lengths"),
    "cache": ("test_kvcache", "test_forward_only"),
    "families": ("test_mlp", "test_activations", "test_rotary", "test_norm", "test_cross_entropy"),
    "drop-in": ("test_dropin", "test_bert_padding", "test_fused_dense", "test_utils_torch"),
}
# Routes of other devices, and inductor, which has no code for this one.
NOT_HERE = (
    "not kernel- and not aten_cpu- and not aten_flash- and not aten_eff and not test_compiled"
)


@pytest.fixture(scope="module")
def library():
    if why_not := stand_in_device.why_not():
        pytest.skip(why_not)
    return stand_in_device.build()


@pytest.mark.parametrize("files", FILES.values(), ids=list(FILES))
def test_on_the_stand_in_device(files, library, provider):
    paths = [str(REPOSITORY / f"tests/python/{name}.py") for name in files]
    options = ["--device", stand_in_device.NAME, "--provider", provider, "-k", NOT_HERE]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", *options, *paths]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
