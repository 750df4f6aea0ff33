"""What pyproject.toml cannot say: the CMake build, start-up files, the drop-in's metadata."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zlib
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

NAME = "anyflash"
ROOT = pathlib.Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools"))

from build_plan import (  # noqa: E402
    host_compiler,
    is_crossed,
    machine,
    no_binary_reason,
    no_cuda_reason,
    setting,
    why_zig,
    zig,
)
from shared_lists import write_lists  # noqa: E402
from wheel_tag import platform_tag  # noqa: E402


class BuildFailed(Exception):
    """A CMake step failed; the text holds the end of its output."""


def run(*command: str) -> None:
    """Runs a command, shows its output and keeps the end of it for the reason of a failure."""
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            sys.stdout.write(line)
            lines.append(line.rstrip())
    if process.returncode:
        telling = [line for line in lines if "rror" in line] or lines
        raise BuildFailed(f"{os.path.basename(command[0])}: " + " | ".join(telling[:3])[:600])


def cmake(cuda: bool, prefix: pathlib.Path) -> None:
    """Configures, builds and installs the libraries into the folder of the package `anyflash`."""
    build = ROOT / "build" / (f"install-{machine()}" if is_crossed() else "install")
    options = {
        "Python_EXECUTABLE": sys.executable,
        "CMAKE_INSTALL_PREFIX": str(prefix),
        "ANYFLASH_CUDA": "ON" if cuda else "OFF",
        "ANYFLASH_WERROR": "ON" if setting("ANYFLASH_WERROR") else "OFF",
    }
    if host_compiler() is None:
        options |= {"CMAKE_CXX_COMPILER": ";".join(zig() or ()), "ANYFLASH_TORCH": "OFF"}
        os.environ["ZIG_GLOBAL_CACHE_DIR"] = str(build / "zig")  # its C++ library, compiled
        if is_crossed():
            options |= {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": machine()}
    if "ANYFLASH_CUDA_ARCHS" in os.environ:
        options["ANYFLASH_CUDA_ARCHS"] = os.environ["ANYFLASH_CUDA_ARCHS"]
    fresh = (
        ["--fresh"] if (build / "CMakeCache.txt").exists() else []
    )  # an isolated build's paths are gone by now
    generator = ["-GNinja"] if shutil.which("ninja") else []
    defines = [f"-D{name}={value}" for name, value in options.items()]
    run("cmake", *fresh, *generator, "-S", str(ROOT), "-B", str(build), *defines)
    run(
        "cmake",
        "--build",
        str(build),
        "--parallel",
        os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
    )
    run("cmake", "--install", str(build), *(["--strip"] if host_compiler() else []))  # zig did


def build_binary(prefix: pathlib.Path) -> dict[str, Any]:
    """Builds what this machine can use: with CUDA, else without, else nothing.

    Returns:
        The facts for ``anyflash/_build.json``: ``binary``, ``cuda``, and ``reasons`` for what is
        missing.

    Raises:
        BuildFailed: ANYFLASH_BUILD=1 or ANYFLASH_CUDA=1 asked for what could not be built.
    """
    no_cuda = no_cuda_reason()
    reasons = [f"cuda: {no_cuda}"] if no_cuda else []
    if host_compiler() is None:
        reasons.append(f"operators: zig builds the kernels only, and {why_zig()}")
    for cuda in (False,) if no_cuda else (True, False):
        try:
            cmake(cuda, prefix)
        except (BuildFailed, OSError) as error:
            if setting("ANYFLASH_BUILD") or (cuda and setting("ANYFLASH_CUDA")):
                raise
            reasons.append(f"{'cuda' if cuda else 'binary'}: the build failed: {error}")
        else:
            return {"binary": True, "cuda": cuda, "reasons": reasons}
    return {"binary": False, "cuda": False, "reasons": reasons}


def write_facts(package: pathlib.Path, facts: dict[str, Any]) -> None:
    """Leaves word for ``python -m anyflash doctor`` and says aloud what is missing."""
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build.json").write_text(json.dumps(facts, indent=1) + "\n")
    if facts["reasons"]:
        kind = "without a part of its binary" if facts["binary"] else "without its binary"
        print(
            f"\n*** anyflash is being installed {kind}:",
            *facts["reasons"],
            "",
            sep="\n***   ",
            file=sys.stderr,
        )


def checksums(package: pathlib.Path) -> dict[str, int]:
    """Of every library, for the loader to compare."""
    return {path.name: zlib.crc32(path.read_bytes()) for path in sorted(package.glob("*.so"))}


class CMakeBuild(build_ext):
    """Drives CMake; there is nothing for setuptools to compile.

    A wheel's libraries get checksums. Those of an editable install are rebuilt by hand as well.
    """

    def run(self) -> None:
        in_tree = self.editable_mode or self.inplace
        package = (ROOT / "python" if in_tree else pathlib.Path(self.build_lib).resolve()) / NAME
        facts = build_binary(package.parent)
        if not in_tree:
            facts["crc32"] = checksums(package)
        write_facts(package, facts)

    def get_outputs(self) -> list[str]:
        return []


class Wheel(bdist_wheel):
    """One wheel for every Python: no library of ours knows which one runs it."""

    def get_tag(self) -> tuple[str, str, str]:
        built = pathlib.Path(self.get_finalized_command("build").build_lib) / NAME
        return "py3", "none", platform_tag(built)


class BuildPy(build_py):
    """Adds the shared lists and, without a binary, the word that there is none.

    The drop-in's metadata has no RECORD on purpose: `pip uninstall flash-attn` then refuses, where
    it would take anyflash's files instead of those of a broken upstream package behind them.
    """

    def run(self) -> None:
        if NO_BINARY and setting("ANYFLASH_BUILD"):  # not before: zig may still be on its way
            raise SystemExit(f"anyflash: ANYFLASH_BUILD=1 asks for the binary, but {NO_BINARY}")
        if self.editable_mode:
            package = ROOT / "python" / NAME
        else:
            package = pathlib.Path(self.build_lib) / NAME
            shutil.rmtree(self.build_lib, ignore_errors=True)  # nothing of a former build comes in
        super().run()
        write_lists(package)
        if NO_BINARY:
            write_facts(package, PURE_PYTHON)


class Dist(Distribution):
    def has_ext_modules(self) -> bool:
        """With the binary the wheel belongs to a platform, and `build_ext` runs."""
        return NO_BINARY is None

    def has_data(self) -> bool:
        """Editable installs take the start-up files only if this method exists."""
        return self.has_data_files()


NO_BINARY = no_binary_reason()
PURE_PYTHON: dict[str, Any] = {"binary": False, "cuda": False, "reasons": [f"binary: {NO_BINARY}"]}

setup(
    distclass=Dist,
    cmdclass={"build_py": BuildPy, "build_ext": CMakeBuild, "bdist_wheel": Wheel},
    # <name>.data/data/../purelib is the root of site-packages, where Python looks for start-up
    # files
    data_files=[("../purelib", ["startup/anyflash.pth", "startup/anyflash.start"])],
)
