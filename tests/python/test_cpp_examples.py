"""The C++ examples: the commands of their READMEs, typed by a user who has installed the wheel."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys

import pytest
from installations import LINUX, REPOSITORY, shell

from anyflash import _loader as loader

pytestmark = [
    LINUX,
    pytest.mark.skipif(
        not shutil.which("cmake", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
        or not (shutil.which("c++") or os.environ.get("CXX")),
        reason="needs cmake and a C++ compiler",
    ),
]

# What the last command prints.
EXAMPLES = {
    "cpp_attention": r"attention_forward_fp32_\w+, \d+ threads: \S+ ms, \d+ GFLOP/s\n"
    r"largest difference from a plain loop: \S+\n",
    "cpp_train": r"largest difference of the first step from Python's: \S+\n"
    r"loss \S+, after 20 steps \S+\n",
    "cpp_torchscript": r"(\w+\.pt: largest difference from Python: \S+\n){2}",
    "cpp_aoti": r"(batch \d, \d+ rows: largest difference from Python: \S+\n){2}",
}


def commands(page: str) -> list[str]:
    return re.findall(r"^    (\S.*)$", page, re.MULTILINE)


@pytest.fixture(scope="module")
def made(provider, user, tmp_path_factory):
    """The folder where a user has gone through an example, and what its program printed."""
    if provider != "binary":
        pytest.skip("C++ programs open the binary")
    if loader.cpu_isa() == "none":
        pytest.skip("no kernel for this CPU")

    @functools.cache
    def make(example: str):
        folder = tmp_path_factory.mktemp("user") / example
        shutil.copytree(REPOSITORY / "examples" / example, folder)
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder.parent / "inductor")}
        for command in commands((folder / "README.md").read_text()):
            done = shell(user, command, folder, **cache)
        return folder, done.stdout

    return make


@pytest.mark.parametrize("example", EXAMPLES)
def test_as_the_readme_says(made, example):
    folder, printed = made(example)
    assert re.fullmatch(EXAMPLES[example], printed), printed
    assert len(commands((folder / "README.md").read_text())) <= 4


def test_every_example_is_here():
    assert {path.name for path in (REPOSITORY / "examples").glob("cpp_*")} == set(EXAMPLES)


def _run(folder, *command, **variables):
    """As a C++ program runs: nothing of Python in its environment."""
    inherited = {
        n: x for n, x in os.environ.items() if not n.startswith(("PYTHON", "ANYFLASH", "VIRTUAL"))
    }
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**inherited, **variables}
    )


def test_kernels_need_no_torch(made):
    folder, _ = made("cpp_attention")
    listed = _run(folder, "ldd", "build/packed_attention").stdout
    needed = [os.path.basename(line.split()[0]) for line in listed.splitlines()]
    assert "libanyflash_kernels.so" in needed
    assert not [name for name in needed if "torch" in name or "python" in name]


@pytest.mark.parametrize("threads", ["1", "3"])
def test_kernels_on_threads_of_the_caller(made, threads):
    done = _run(made("cpp_attention")[0], "build/packed_attention", threads)
    assert done.returncode == 0 and f"{threads} threads" in done.stdout, done


def test_a_kernel_that_is_not_there_has_a_reason(made):
    done = _run(made("cpp_attention")[0], "build/packed_attention", ANYFLASH_CPU_ISA="none")
    assert done.returncode == 1
    assert "ANYFLASH_CPU_ISA allows none" in done.stderr


GENERATE = ("build/generate", "scripted.pt", "traced.pt")


def test_notices_go_to_standard_error_without_python(made):
    done = _run(made("cpp_torchscript")[0], *GENERATE, ANYFLASH_CPU_ISA="none")
    assert done.returncode == 0
    assert done.stderr.count("anyflash: attention runs on") == 1
    assert "aten_cpu" in done.stderr


def test_strict_mode_reaches_c_plus_plus(made):
    settings = {"ANYFLASH_STRICT": "1", "ANYFLASH_CPU_ISA": "none"}
    done = _run(made("cpp_torchscript")[0], *GENERATE, **settings)
    assert done.returncode == 1
    assert 'no back end of "kernel" can run this attention' in done.stderr


@pytest.mark.parametrize(
    "example, program", [("cpp_train", "train"), ("cpp_torchscript", "generate")]
)
def test_a_missing_file_is_an_error_message(made, example, program):
    done = _run(made(example)[0], f"build/{program}", "nowhere.pt")
    assert done.returncode == 1
    assert "nowhere.pt" in done.stderr


def test_the_readme_as_pasted(provider, user, tmp_path):
    if provider != "binary":
        pytest.skip("C++ programs open the binary")
    section = (REPOSITORY / "README.md").read_text().split("\n### C++\n")[1].split("\n## ")[0]
    (code,), (project,), (lines,) = (
        re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
        for language in ("cpp", "cmake", "sh")
    )
    (tmp_path / "attend.cpp").write_text(code)
    (tmp_path / "CMakeLists.txt").write_text(project)
    for command in lines.splitlines():
        done = shell(user, command, tmp_path)
    assert done.stdout == "[2, 1024, 8, 64] [2, 1024, 8, 64]\n"
