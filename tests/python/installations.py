"""Installations of anyflash in fresh virtual environments. conftest.py makes the fixtures known.

One wheel is built per session, from an sdist, as a release is; with --dist they are the ones of a
release. Nothing is downloaded: torch and the build tools are the ones of the environment that runs
the tests.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from tree import REPOSITORY, tracked

sys.path.append(str(REPOSITORY / "tools"))
import nvrtc  # noqa: E402

SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
CUDA = "1" if nvrtc.find(75) else "0"
NO_COMPILER = "/nowhere/c++"  # as CXX: also where ziglang is installed
MACHINE = platform.machine()
OTHER_MACHINE = "x86_64" if MACHINE == "aarch64" else "aarch64"  # for which zig compiles
LINUX = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the binary is built on Linux"
)

SMOKE = """
import json, sys, torch, flash_attn, flash_attn_2_cuda, importlib.metadata as metadata
from anyflash import _loader
q = torch.randn(1, 5, 2, 16, requires_grad=True)
out = flash_attn.flash_attn_func(q, q, q, causal=True)
out.sum().backward()
assert out.shape == q.shape and q.grad.isfinite().all()
version = metadata.version("flash-attn")
print(json.dumps({"file": flash_attn.__file__, "version": version, "provider": _loader.provider}))
"""


def call(*command, check=True, cwd=None, **environment) -> subprocess.CompletedProcess:
    """Runs a command without the settings of this session; a failure shows its output."""
    inherited = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("ANYFLASH_", "PYTHON", "VIRTUAL_ENV"))
    }
    done = subprocess.run(
        list(map(str, command)),
        encoding="utf-8",  # pip's, in every locale
        capture_output=True,
        cwd=cwd,
        env={**inherited, **environment},
    )
    if check and done.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


class Environment:
    """A virtual environment that sees this one's packages, but not its anyflash."""

    def __init__(self, folder: Path, libraries: Path, python: Path = Path(sys.executable)):
        call(python, "-m", "venv", "--without-pip", folder)
        self.python = folder / "bin/python"
        self.site = Path(
            call(
                self.python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"
            ).stdout.strip()
        )
        (self.site / "zz_libraries.pth").write_text(f"{libraries}\n")
        self.empty = self.files()

    def files(self) -> set[str]:
        return {
            p.relative_to(self.site).as_posix()
            for p in self.site.rglob("*")
            if "__pycache__" not in p.parts
        }

    def pip(self, *arguments, check=True, **environment) -> subprocess.CompletedProcess:
        quiet = ("--disable-pip-version-check", "--no-input")
        return call(
            sys.executable,
            "-m",
            "pip",
            "--python",
            self.python,
            *quiet,
            *arguments,
            check=check,
            **environment,
        )

    def install(self, *arguments, **environment) -> None:
        self.pip(
            "install", "--no-index", "--no-deps", "--no-build-isolation", *arguments, **environment
        )

    def run(self, code: str, *options, check=True, **environment) -> subprocess.CompletedProcess:
        return call(
            self.python, *options, "-c", code, check=check, cwd=self.site.parent, **environment
        )

    def smoke(self, **environment) -> dict[str, str]:
        return json.loads(self.run(SMOKE, **environment).stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def libraries(tmp_path_factory) -> Path:
    """This environment's packages without everything that is ours."""
    folder = tmp_path_factory.mktemp("libraries")
    for entry in SITE_PACKAGES.iterdir():
        ours = entry.name.startswith(("anyflash", "_anyflash", "__editable__", "flash_attn"))
        if not ours and entry.suffix not in (".pth", ".start"):
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def environment(tmp_path, libraries) -> Environment:
    return Environment(tmp_path / "venv", libraries)


@pytest.fixture(scope="session")
def user(tmp_path_factory, libraries, wheel) -> Environment:
    """The wheel in one folder with torch and all else, as a user has it."""
    folder = tmp_path_factory.mktemp("user")
    environment = Environment(folder / "venv", folder / "nothing")
    for entry in libraries.iterdir():
        (environment.site / entry.name).symlink_to(entry.resolve())
    environment.install(wheel)
    return environment


def shell(environment: Environment, command: str, cwd: Path, check=True, **variables: str):
    """Runs a line as a user types it, whose `python` is the environment's."""
    path = (environment.python.parent, Path(sys.executable).parent, os.environ["PATH"])
    variables["PATH"] = os.pathsep.join(map(str, path))
    return call("bash", "-c", command, cwd=cwd, check=check, **variables)


def check_out(folder: Path) -> Path:
    """Copies the tracked files there."""
    for path in tracked("**"):
        target = folder / path.relative_to(REPOSITORY)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A copy of the source tree, as a checkout has it."""
    return check_out(tmp_path_factory.mktemp("source") / "anyflash")


def build(folder: Path, out: Path, *options: str, **environment: str) -> Path:
    """Builds packages with the tools of this environment; returns the wheel."""
    call(
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        out,
        *options,
        folder,
        **environment,
    )
    return next(out.glob("*.whl"))


def released_wheel(config: pytest.Config, machine: str) -> Path | None:
    """The wheel for a processor family in the folder of --dist; None without the option."""
    folder = config.getoption("--dist")
    if folder is None:
        return None
    (found,) = Path(folder).resolve().glob(f"anyflash-*{machine}.whl")
    return found


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory, pytestconfig) -> Path:
    """The wheel with the binary, from the sdist beside it; with code for one GPU architecture."""
    return released_wheel(pytestconfig, MACHINE) or build(
        source, tmp_path_factory.mktemp("wheel"), ANYFLASH_BUILD="1", ANYFLASH_CUDA=CUDA,
        ANYFLASH_CUDA_ARCHS="75",
    )  # fmt: skip


@pytest.fixture(scope="session")
def sdist(wheel) -> Path:
    (found,) = wheel.parent.glob("anyflash-*.tar.gz")
    return found


@pytest.fixture(scope="session")
def crossed_wheel(source, tmp_path_factory, pytestconfig) -> Path:
    """The wheel for the other processor family; optimised a little only, which spares time."""
    return released_wheel(pytestconfig, OTHER_MACHINE) or build(
        source, tmp_path_factory.mktemp("crossed"), "--wheel", ANYFLASH_BUILD="1",
        ANYFLASH_WERROR="1", ANYFLASH_MACHINE=OTHER_MACHINE, CMAKE_BUILD_TYPE="Quick",
        CXXFLAGS="-O1",
    )  # fmt: skip


@pytest.fixture(scope="session")
def pure_wheel(source, tmp_path_factory) -> Path:
    """The wheel of a machine without a compiler."""
    return build(source, tmp_path_factory.mktemp("pure"), "--wheel", CXX=NO_COMPILER)


@pytest.fixture(scope="session")
def broken_upstream(tmp_path_factory) -> Path:
    """A wheel flash_attn 2.7.4 whose import fails, as the real one's does beside another torch."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "flash_attn").mkdir()
    (folder / "flash_attn/__init__.py").write_text("import flash_attn_2_cuda\n")
    (folder / "flash_attn_2_cuda.py").write_text(
        "raise ImportError('undefined symbol: _ZN3c104cuda9SetDeviceEab')\n"
    )
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "flash_attn"\nversion = "2.7.4"\n'
        '[tool.setuptools]\npackages = ["flash_attn"]\npy-modules = ["flash_attn_2_cuda"]\n'
    )
    return build(folder, folder / "dist", "--wheel")


@pytest.fixture(scope="session")
def companion(source, tmp_path_factory):
    """Builds the wheel called flash-attn in a version of one's choice, as README.md says."""

    def build_version(version: str = "") -> Path:
        out = tmp_path_factory.mktemp("companion")
        options = ("--no-deps", "--no-build-isolation", "--no-index", "-w", out)
        command = (sys.executable, "-m", "pip", "wheel", *options, source / "packaging/flash-attn")
        call(*command, ANYFLASH_COMPANION_VERSION=version)
        return next(out.glob("*.whl"))

    return build_version


def doctor_of(environment: Environment, **variables: str) -> dict:
    """The report of `python -m anyflash doctor --json` there."""
    command = (environment.python, "-m", "anyflash", "doctor", "--json")
    done = call(*command, check=False, cwd=environment.site.parent, **variables)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)
