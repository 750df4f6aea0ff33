"""The wheels of a release: on which systems they can be loaded, and what they hold.

Two kinds: this machine's, and the other processor family's, which zig compiles. `make wheels` has
this file look at those that it made (--release).
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from elf import exports, needed, newest, output, processor, runpath, undefined
from installations import LINUX, MACHINE, NO_COMPILER, OTHER_MACHINE, call
from tree import REPOSITORY, tracked

# `source`: wheels are asked for by name here, and conftest.py looks for who builds them.
pytestmark = [LINUX, pytest.mark.usefixtures("source")]

KERNELS, OPS = "libanyflash_kernels.so", "libanyflash_ops.so"
PROCESSORS = {"x86_64": "Advanced Micro Devices X86-64", "aarch64": "AArch64"}
#: What there is only with the operators for LibTorch.
OF_THE_OPERATORS = {
    f"anyflash/{OPS}",
    "anyflash/include/anyflash/attention.h",
    "anyflash/include/anyflash/autograd.h",
}


class Wheel(NamedTuple):
    path: Path
    machine: str
    names: set[str]
    libraries: dict[str, Path]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory, request):
    """A wheel and its libraries, by the name of its fixture."""

    def unpack(fixture: str) -> Wheel:
        path = request.getfixturevalue(fixture)
        folder = tmp_path_factory.mktemp(fixture)
        with zipfile.ZipFile(path) as archive:
            names = {name for name in archive.namelist() if ".dist-info/" not in name}
            libraries = {Path(name).name: folder / name for name in names if ".so" in name}
            archive.extractall(folder, [f"anyflash/{name}" for name in libraries])
        machine = MACHINE if fixture == "wheel" else OTHER_MACHINE
        return Wheel(path, machine, names, libraries)

    made = {}
    return lambda fixture: made.get(fixture) or made.setdefault(fixture, unpack(fixture))


@pytest.fixture(params=["wheel", "crossed_wheel"])
def either(request, unpacked) -> Wheel:
    return unpacked(request.param)


def audit(wheel: Path) -> dict:
    """What auditwheel says of a wheel."""
    pytest.importorskip("auditwheel", reason="needs Python 3.10")
    return json.loads(output(sys.executable, "-m", "auditwheel", "show", "--json", wheel))


def test_auditwheel_finds_what_the_name_says(either, tmp_path):
    """Without the operators, which a system that is too old for them never opens (wheel_tag.py)."""
    kernels_only = tmp_path / either.path.name
    with zipfile.ZipFile(either.path) as wheel, zipfile.ZipFile(kernels_only, "w") as copy:
        for name in wheel.namelist():
            if not name.endswith(OPS):
                content = wheel.read(name)
                if name.endswith("/RECORD"):  # auditwheel looks at the files in this list
                    content = re.sub(rb".*/%s,.*\n" % OPS.encode(), b"", content)
                copy.writestr(name, content)
    report = audit(kernels_only)
    assert report["overall_tag"] == report["sym_tag"] == f"manylinux_2_17_{either.machine}", report
    assert not report["external_libs"] and not report["unsupported_isa"]


def test_auditwheel_finds_the_operators_older_than_their_torch(unpacked):
    """torch 2.10 is itself a wheel for glibc 2.28."""
    report = audit(unpacked("wheel").path)
    assert set(report["external_libs"]) == {"libtorch_cpu.so"}
    glibc = re.match(r"manylinux_(\d+)_(\d+)_", report["sym_tag"])
    assert glibc and tuple(map(int, glibc.groups())) <= (2, 28), report


def test_no_library_knows_a_python(either):
    """So that `py3-none` is true: none of Python's names, no library of it, none by file name."""
    assert either.path.name.split("-")[2:4] == ["py3", "none"]
    for name, library in either.libraries.items():
        assert name in (KERNELS, OPS)
        assert not [n for n in undefined(library) if n.startswith(("Py", "_Py"))]
        assert not [n for n in needed(library) if "python" in n]


def test_every_library_is_for_the_processor_of_the_name(either):
    assert either.path.stem.endswith(f"_{either.machine}")
    assert {processor(path) for path in either.libraries.values()} == {PROCESSORS[either.machine]}


def test_the_crossed_library_asks_only_for_an_old_system(unpacked):
    library = unpacked("crossed_wheel").libraries[KERNELS]
    assert needed(library) <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2"}
    assert runpath(library) == ["$ORIGIN"]
    assert newest(library, "GLIBC") == (2, 17)
    assert not newest(library, "GLIBCXX")


def test_both_wheels_are_one_package(unpacked):
    """One interface of the kernels, and the same files but for the operators."""
    wheel, crossed = unpacked("wheel"), unpacked("crossed_wheel")
    assert exports(crossed.libraries[KERNELS]) == exports(wheel.libraries[KERNELS])
    assert crossed.names == wheel.names - OF_THE_OPERATORS


def test_every_file_is_of_the_tree_or_of_the_build(either):
    """Nothing that lay about: tracked Python files, libraries, headers, CMake's files."""
    files = {p.relative_to(REPOSITORY / "python").as_posix() for p in tracked("python/**")}
    made = {f"anyflash/{name}" for name in ("_build.json", "_lists.py", *either.libraries)}
    made |= {f"anyflash/cmake/anyflashConfig{end}.cmake" for end in ("", "Version")}
    headers = {n for n in either.names if n.startswith("anyflash/include/anyflash/")}
    start_up = {n for n in either.names if ".data/purelib/anyflash." in n}
    assert either.names == (either.names & files) | made | headers | start_up
    sources = {p.name for p in tracked("include/anyflash/*", "kernels/*", "core/*")}
    assert {n.rpartition("/")[2] for n in headers} <= sources and len(start_up) == 2


def test_the_crossed_wheel_says_what_it_lacks(unpacked):
    with zipfile.ZipFile(unpacked("crossed_wheel").path) as archive:
        facts = json.loads(archive.read("anyflash/_build.json"))
    assert set(facts["crc32"]) == {KERNELS} and facts["binary"] and not facts["cuda"]
    said = f"for {OTHER_MACHINE} on {MACHINE}"
    assert [r.split(":")[0] for r in facts["reasons"] if said in r] == ["cuda", "operators"]


@pytest.mark.parametrize("wanted", ["riscv64", "x86"])
def test_a_processor_that_zig_does_not_serve_here_is_named(source, wanted):
    code = "import build_plan; print(build_plan.announcement())"
    said = call(sys.executable, "-c", code, cwd=source / "tools", ANYFLASH_MACHINE=wanted).stdout
    assert f"ANYFLASH_MACHINE: expected x86_64 or aarch64, got {wanted!r}" in said


def test_the_sdist_holds_files_of_the_tree(sdist):
    """And what setuptools adds. That nothing is missing the wheel shows, which is made of it."""
    with tarfile.open(sdist) as archive:
        names = {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()}
    made = {n for n in names if "egg-info/" in n} | {"PKG-INFO", "setup.cfg"}
    assert names - made <= {p.relative_to(REPOSITORY).as_posix() for p in tracked("**")}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "tools/build_backend.py"} <= names


def test_the_sdist_installs_without_a_compiler(environment, sdist):
    environment.install(sdist, CXX=NO_COMPILER)
    assert environment.smoke()["provider"] == "python"
    environment.pip("uninstall", "-y", "anyflash")
    assert environment.files() == environment.empty
