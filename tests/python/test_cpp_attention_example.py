"""examples/cpp_attention as its README says: built against the installed kernels, without torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
from support import REPOSITORY

import anyflash
from anyflash import _loader as loader

EXAMPLE = REPOSITORY / "examples/cpp_attention"


@pytest.fixture(scope="module")
def program(provider, tmp_path_factory):
    if provider != "binary":
        pytest.skip("C++ programs open the binary")
    if loader.cpu_isa() == "none":
        pytest.skip("no kernel for this CPU")
    cmake = shutil.which("cmake", path=os.path.dirname(sys.executable)) or shutil.which("cmake")
    if not cmake or not (shutil.which("c++") or os.environ.get("CXX")):
        pytest.skip("needs cmake and a C++ compiler")
    build = tmp_path_factory.mktemp("cpp_attention")
    prefix = f"-DCMAKE_PREFIX_PATH={anyflash.__path__[0]}"
    for command in ([cmake, "-S", EXAMPLE, "-B", build, prefix], [cmake, "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "packed_attention"


@pytest.mark.parametrize("threads", [1, 3])
def test_agrees_with_a_plain_loop(program, threads):
    done = subprocess.run([program, str(threads)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"_fp32_\w+, {threads} threads: \S+ ms, \d+ GFLOP/s", done.stdout)


def test_needs_no_torch(program):
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    needed = [os.path.basename(line.split()[0]) for line in listed.splitlines()]
    assert "libanyflash_kernels.so" in needed
    assert not [name for name in needed if "torch" in name or "python" in name]
