"""examples/cpp_torchscript as its README says: saved in Python, built, run without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from support import REPOSITORY

from anyflash import _loader as loader

EXAMPLE = REPOSITORY / "examples/cpp_torchscript"
# Kept between runs: torch/script.h takes half a minute to compile.
BUILD = REPOSITORY / "out/cpp_torchscript"


def _run(*command, **options):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=600, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def program(provider):
    if provider != "binary":
        pytest.skip("C++ programs open the binary")
    cmake = shutil.which("cmake", path=os.path.dirname(sys.executable)) or shutil.which("cmake")
    if not cmake or not (shutil.which("c++") or os.environ.get("CXX")):
        pytest.skip("needs cmake and a C++ compiler")
    python = f"-DPython3_EXECUTABLE={sys.executable}"
    _run(cmake, "-S", EXAMPLE, "-B", BUILD, python, "-DCMAKE_BUILD_TYPE=Release")
    _run(cmake, "--build", BUILD)
    return BUILD / "run_block"


@pytest.fixture(scope="module")
def model(tmp_path_factory, provider):
    path = tmp_path_factory.mktemp("model") / "block.pt"
    _run(sys.executable, EXAMPLE / "make_model.py", path, env=_environment())
    return path


def _environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _bare():
    """A C++ program's environment: nothing of Python."""
    return {
        n: x for n, x in os.environ.items() if not n.startswith(("PYTHON", "ANYFLASH", "VIRTUAL"))
    }


def test_outputs_are_equal(program, model):
    printed = _run(program, loader.LIBRARY, model, env=_bare())
    assert "largest difference from Python" in printed
    assert "301 tokens" in printed


def test_missing_library_is_an_error_message(program, model):
    done = subprocess.run([program, "nowhere.so", model], capture_output=True, text=True)
    assert done.returncode == 1
    assert "nowhere.so" in done.stderr


def test_notices_go_to_standard_error_without_python(program, model):
    done = subprocess.run(
        [program, loader.LIBRARY, model],
        capture_output=True,
        text=True,
        env={**_bare(), "ANYFLASH_CPU_ISA": "none"},
    )
    assert done.returncode == 0
    assert done.stderr.count("anyflash: attention runs on") == 1
    assert "aten_cpu" in done.stderr


def test_strict_mode_reaches_c_plus_plus(program, model):
    done = subprocess.run(
        [program, loader.LIBRARY, model],
        capture_output=True,
        text=True,
        env={**_bare(), "ANYFLASH_STRICT": "1", "ANYFLASH_CPU_ISA": "none"},
    )
    assert done.returncode == 1
    assert 'no back end of "kernel" can run this attention' in done.stderr
