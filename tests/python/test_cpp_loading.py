"""The library of operators in a C++ program that links libtorch_cpu alone, twice, and beside
definitions in Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import cpp_builds
import pytest
from support import run_python

from anyflash import _loader as loader

NOTICE = (
    "anyflash: libanyflash_ops.so did not register its operators: already defined in this process, "
    "which goes on with that definition: anyflash::_flash_attn_forward"
)
ATTENDS = """
q = torch.randn(1, 5, 2, 8)
out = torch.ops.anyflash.flash_attn_func(q, q, q, causal=True)
expected = torch.nn.functional.scaled_dot_product_attention(
    *[q.transpose(1, 2)] * 3, is_causal=True
).transpose(1, 2)
torch.testing.assert_close(out, expected)
"""


@pytest.fixture(scope="module", autouse=True)
def _needs(provider):
    if provider != "binary":
        pytest.skip("C++ programs open the binary")


@pytest.fixture(scope="module")
def another_copy(tmp_path_factory) -> Path:
    """The libraries in another folder, as another installation has them."""
    folder = tmp_path_factory.mktemp("copy")
    for path in (loader.LIBRARY, loader.KERNELS):
        shutil.copy(path, folder)
    return folder / loader.LIBRARY.name


@pytest.fixture(scope="module")
def program():
    if cpp_builds.compiler() is None:
        pytest.skip("needs a C++ compiler")
    return cpp_builds.compiled(Path(__file__).with_name("loading.cpp"))


def run(*command):
    environment = {n: x for n, x in os.environ.items() if not n.startswith(("ANYFLASH", "PYTHON"))}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_libtorch_cpu_is_all_that_a_program_links(program):
    listed = subprocess.run(["readelf", "-d", program], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"\(NEEDED\).*\[(lib(?:torch|c10|anyflash)\w*)", listed.stdout))
    assert needed == {"libtorch_cpu", "libc10"}
    done = run(program, loader.LIBRARY)
    assert done.returncode == 0 and done.stderr == ""
    first, difference, refusal = done.stdout.splitlines()[:3]
    assert first == "library 1: ''"
    assert float(difference.split()[-1]) < 1e-5
    assert "v: expected the shape of k, (1, 5, 2, 8)" in refusal and "(1, 3, 2, 8)" in refusal


def test_without_the_library(program):
    done = run(program)
    assert done.returncode == 0
    assert "_flash_attn_forward: no such operator" in done.stdout
    assert "link anyflash::ops or open the file that `python -m anyflash --library`" in done.stdout


def test_two_copies(program, another_copy):
    done = run(program, loader.LIBRARY, another_copy)
    first, second, difference, *_ = done.stdout.splitlines()
    assert first == "library 1: ''"
    assert second.startswith("library 2: 'already defined in this process")
    assert float(difference.split()[-1]) < 1e-5
    assert done.stderr == f"{NOTICE}\n"


def test_beside_the_operators_in_python(another_copy):
    run_python(
        "import logging, sys, torch, anyflash\n"
        "from anyflash import _loader\n"
        "assert _loader.provider == 'python'\n"
        "said = []\n"
        "logging.getLogger('anyflash').addFilter(lambda r: said.append(r.getMessage()))\n"
        f"torch.ops.load_library({str(another_copy)!r})\n{ATTENDS}"
        f"assert said == [{NOTICE!r}], said",
        ANYFLASH_PROVIDER="python",
    )


def test_a_copy_that_was_there_before_python(another_copy):
    run_python(
        f"import torch; torch.ops.load_library({str(another_copy)!r})\n"
        "import anyflash\n"
        "from anyflash import _loader\n"
        f"assert _loader.provider == 'binary'\n{ATTENDS}"
        "assert 'already defined' in _loader.reasons[0], _loader.reasons"
    )
