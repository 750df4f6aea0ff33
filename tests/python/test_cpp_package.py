"""find_package(anyflash) and the options of `python -m anyflash` for C++, in the wheel."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from installations import LINUX, Environment, call, shell

pytestmark = [
    LINUX,
    pytest.mark.skipif(
        not shutil.which("cmake", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
        or not (shutil.which("c++") or os.environ.get("CXX")),
        reason="needs cmake and a C++ compiler",
    ),
]

PROJECT = """
cmake_minimum_required(VERSION 3.20)
project(client LANGUAGES CXX)
find_package(anyflash 0.1 REQUIRED COMPONENTS {component})
{before}
add_executable(client client.cpp)
target_link_libraries(client PRIVATE anyflash::{component} {more})
"""
# The header of anyflash is there too: the examples include it, which takes half a minute.
OPS = """
#include <torch/csrc/api/include/torch/version.h>
#include <cstdio>
extern "C" const char* anyflash_register_error(void);
int main() { std::printf("torch %d.%d '%s'\\n", TORCH_VERSION_MAJOR, TORCH_VERSION_MINOR,
                         anyflash_register_error()); }
"""
KERNELS = """
#include <anyflash/kernels.h>
#include <cstdio>
int main() {
  int count = 0;
  anyflash_instances(&count);
  std::printf("%d\\n", count);
}
"""


@pytest.fixture(autouse=True)
def _binary(provider):
    if provider != "binary":
        pytest.skip("C++ programs open the binary")


class Client:
    """A CMake project in a folder of its own."""

    def __init__(self, folder: Path, environment: Environment):
        self.folder, self.environment = folder, environment

    def configure(self, prefix: str, component: str, code: str, before: str = "", more: str = ""):
        self.folder.mkdir(exist_ok=True)
        project = PROJECT.format(component=component, before=before, more=more)
        (self.folder / "CMakeLists.txt").write_text(project)
        (self.folder / "client.cpp").write_text(code)
        command = f'cmake -S . -B build -DCMAKE_PREFIX_PATH="{prefix}"'
        return shell(self.environment, command, self.folder, check=False)

    def run(self, *configuration: str, **more: str) -> str:
        done = self.configure(*configuration, **more)
        assert done.returncode == 0, done.stderr
        command = "cmake --build build && build/client"
        return shell(self.environment, command, self.folder).stdout.splitlines()[-1]

    def loaded(self) -> str:
        """What the program opens."""
        return shell(self.environment, "ldd build/client", self.folder).stdout


@pytest.fixture
def client(user, tmp_path) -> Client:
    return Client(tmp_path / "client", user)


CMAKE_DIR = "$(python -m anyflash --cmake-dir)"


def test_options_print_paths(user):
    package = user.site / "anyflash"
    for option, path in (("--cmake-dir", "cmake"), ("--library", "libanyflash_ops.so")):
        done = call(user.python, "-m", "anyflash", option)
        assert done.stdout == f"{package / path}\n" and done.stderr == ""
        assert (package / path).exists()


def test_options_need_no_torch(wheel, tmp_path):
    """A C++ program brings its own LibTorch."""
    environment = Environment(tmp_path / "venv", tmp_path / "nothing")
    environment.install(wheel)
    done = call(environment.python, "-m", "anyflash", "--cmake-dir")
    assert done.stdout == f"{environment.site / 'anyflash/cmake'}\n"
    refused = call(environment.python, "-m", "anyflash", "doctor", check=False)
    assert refused.returncode == 1 and "needs PyTorch" in refused.stderr


def test_options_say_why_a_file_is_not_there(pure_wheel, environment):
    environment.install(pure_wheel)
    for option in ("--cmake-dir", "--library"):
        done = call(environment.python, "-m", "anyflash", option, check=False)
        assert done.returncode == 1 and done.stdout == ""
        assert "is not there: " in done.stderr and "no C++ compiler" in done.stderr


def test_kernels(client, user):
    assert int(client.run(CMAKE_DIR, "kernels", KERNELS)) > 0
    assert f"{user.site}/anyflash/libanyflash_kernels.so" in client.loaded()
    assert "torch" not in client.loaded()


def test_the_torch_beside_it(client, user):
    assert client.run(CMAKE_DIR, "ops", OPS).endswith("''")
    assert f"{user.site}/torch/lib/libtorch_cpu.so" in client.loaded()


@pytest.fixture
def zip_libtorch(user, tmp_path) -> Path:
    """LibTorch as its zip file has it: a folder libtorch with include, lib and share."""
    folder = tmp_path / "libtorch"
    for path in ("include", "lib", "share/cmake/Torch"):
        (folder / path).mkdir(parents=True)
        for entry in (user.site / "torch" / path).iterdir():
            (folder / path / entry.name).symlink_to(entry.resolve())
    if (user.site / "nvidia").exists():  # where a wheel's libraries look for CUDA's
        (folder.parent / "nvidia").symlink_to((user.site / "nvidia").resolve())
    return folder


@pytest.mark.parametrize("prefix", ["libtorch", "libtorch/share/cmake"])
def test_a_libtorch_of_ones_own(client, zip_libtorch, prefix):
    """Before the one beside anyflash."""
    prefixes = f"{CMAKE_DIR};{zip_libtorch.parent / prefix}"
    assert client.run(prefixes, "ops", OPS).endswith("''")
    assert f"{zip_libtorch}/lib/libtorch_cpu.so" in client.loaded()


def test_the_torch_of_the_project(client, user, zip_libtorch):
    """What find_package(Torch) makes is a target `torch`; whoever has it, links it."""
    lib, include = zip_libtorch / "lib", zip_libtorch / "include"
    target = (
        "add_library(torch INTERFACE IMPORTED)\n"
        "target_link_options(torch INTERFACE LINKER:--no-as-needed)\n"
        f"target_link_libraries(torch INTERFACE {lib}/libtorch_cpu.so {lib}/libc10.so)\n"
        f"target_include_directories(torch INTERFACE {include})\n"
    )
    assert client.run(CMAKE_DIR, "ops", OPS, before=target, more="torch").endswith("''")
    assert f"{lib}/libtorch_cpu.so" in client.loaded()
    assert f"{user.site}/torch" not in client.loaded()


@pytest.fixture
def without_operators(user, tmp_path) -> Path:
    """An install tree of a build without them, as that of a machine without g++ is."""
    prefix = tmp_path / "prefix"
    shutil.copytree(user.site / "anyflash", prefix / "anyflash")
    (prefix / "anyflash/libanyflash_ops.so").unlink()
    return prefix


def test_an_install_tree_without_operators(client, without_operators):
    assert int(client.run(str(without_operators), "kernels", KERNELS)) > 0
    refused = client.configure(str(without_operators), "ops", OPS)
    assert refused.returncode
    text = " ".join(refused.stderr.split())
    assert "anyflash has no ops; `python -m anyflash doctor` says why" in text
