"""The compiled files: what they export and need; and the import when they are damaged."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from elf import exports, needed, newest, output, runpath, undefined
from installations import REPOSITORY

import anyflash

sys.path.append(str(REPOSITORY / "tools"))
from shared_lists import write_lists  # noqa: E402
from wheel_tag import needed_versions, platform_tag  # noqa: E402

PACKAGE = Path(anyflash.__file__).parent
KERNELS, OPS = PACKAGE / "libanyflash_kernels.so", PACKAGE / "libanyflash_ops.so"
FILES = [pytest.param(path, id=path.name.split(".")[0]) for path in (KERNELS, OPS)]

pytestmark = pytest.mark.skipif(
    not OPS.is_file(), reason="anyflash is installed without the binary"
)

USE = """
import json, torch, flash_attn, anyflash
from anyflash import _loader
q = torch.randn(1, 5, 2, 16, requires_grad=True)
out = flash_attn.flash_attn_func(q, q, q, causal=True)
out.sum().backward()
assert q.grad.isfinite().all()
print(json.dumps({"provider": _loader.provider, "reasons": _loader.reasons}))
"""


@pytest.mark.parametrize("library", FILES)
def test_only_our_names_are_visible(library):
    names = exports(library)
    assert names and all(name.startswith("anyflash_") for name in names), names


def test_exports():
    assert "anyflash_register_error" in exports(OPS)
    assert {
        "anyflash_find_kernel",
        "anyflash_instances",
        "anyflash_launch",
        "anyflash_error_string",
        "anyflash_layout",
        "anyflash_set_notice_sink",
    } <= exports(KERNELS)


@pytest.mark.parametrize("library", FILES)
def test_nothing_with_a_version_of_its_own_is_needed(library):
    """No CUDA library, and of torch only libtorch_cpu, for the operators only."""
    system = {
        "libgcc_s.so.1",
        "libc.so.6",
        "libm.so.6",
        "libdl.so.2",
        "libpthread.so.0",
        "librt.so.1",
    }
    others = {
        KERNELS: set(),
        OPS: {"libanyflash_kernels.so", "libtorch_cpu.so", "libstdc++.so.6"},
    }[library]
    assert {n for n in needed(library) if not n.startswith("ld-linux")} - system == others
    assert runpath(library) == ["$ORIGIN"]


def test_of_torch_only_the_stable_interface_is_used():
    assert not [n for n in undefined(KERNELS) if "torch" in n]
    torch_names = {n for n in undefined(OPS) if not n.startswith("anyflash_")}
    assert not [n for n in torch_names if re.search(r"N?K?(2at|3c10|5torch)\d", n)]
    assert [n for n in torch_names if n.startswith(("aoti_torch_", "torch_"))]


def test_every_function_of_ours_is_defined():
    """Nothing of libtorch is there to link against, so the linker cannot tell."""
    assert not [name for path in (KERNELS, OPS) for name in undefined(path) if "8anyflash" in name]


def test_torch_abi_audit_says_stable():
    pytest.importorskip("torch_abi_audit", reason="needs Python 3.11")
    report = output(sys.executable, "-c", "from torch_abi_audit.cli import main; main()", OPS)
    assert re.search(r"Torch ABI:\s+STABLE\b", report), report
    assert re.search(r"Min torch:\s+2\.10", report), report


def test_systems_of_2014_can_load_it():
    """The kernels with every torch; torch 2.10, which the operators are for, asks for GLIBCXX
    3.4.22 itself."""
    assert platform_tag(PACKAGE).startswith("manylinux2014")
    for library in (KERNELS, OPS):
        assert newest(library, "GLIBC") <= (2, 17)
        assert newest(library, "GLIBCXX") <= (3, 4, 21)
    assert {name.decode(): v for name, v in needed_versions(OPS).items()} == {
        name: newest(OPS, name) for name in ("GLIBC", "GLIBCXX", "CXXABI", "GCC")
    }


@pytest.mark.parametrize("library", FILES)
def test_no_path_of_the_machine_that_built_it_is_inside(library):
    content = library.read_bytes()
    assert str(PACKAGE.parents[1]).encode() not in content
    assert b"/include/torch/" not in content


def damaged_package(folder: Path, name: str, content: bytes | None) -> Path:
    """A copy of the package, as a wheel holds it, in which one library is replaced, or missing."""
    copy = folder / "anyflash"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    write_lists(copy)
    crc32 = {path.name: zlib.crc32(path.read_bytes()) for path in copy.glob("*.so")}
    (copy / "_build.json").write_text(json.dumps({"reasons": [], "crc32": crc32}))
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    return copy


def use(package: Path, code: str = USE, **environment: str) -> subprocess.CompletedProcess:
    path = f"{package / 'dropin'}:{package.parent}"
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin", "PYTHONPATH": path, **environment},
    )


def flipped(library: Path) -> bytes:
    """The content with one bit changed in a text, which no code reads while it is loaded."""
    text = b"expected "
    content = bytearray(library.read_bytes())
    content[content.index(text)] ^= 1
    return bytes(content)


DAMAGE = {
    "one bit of the operators": (OPS.name, lambda: flipped(OPS)),
    "one bit of the kernels": (KERNELS.name, lambda: flipped(KERNELS)),
    "missing operators": (OPS.name, lambda: None),
    "empty operators": (OPS.name, lambda: b""),
    "truncated operators": (OPS.name, lambda: OPS.read_bytes()[: OPS.stat().st_size // 2]),
    "operators that are text": (OPS.name, lambda: b"not a library\n" * 100),
    "operators of another machine": (
        OPS.name,
        lambda: OPS.read_bytes()[:18] + b"\xb7\x00" + OPS.read_bytes()[20:],
    ),
    "operators that are something else": (OPS.name, KERNELS.read_bytes),
    "missing kernels": (KERNELS.name, lambda: None),
    "truncated kernels": (
        KERNELS.name,
        lambda: KERNELS.read_bytes()[: KERNELS.stat().st_size // 2],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_leave_a_working_import_and_a_reason(tmp_path, damage):
    name, content = DAMAGE[damage]
    done = use(damaged_package(tmp_path, name, content()))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["provider"] == "python"
    assert any(name in reason for reason in found["reasons"]), found
    assert content() is None or any("is damaged" in reason for reason in found["reasons"])


def test_without_checksums_the_libraries_are_used(tmp_path):
    """As in an editable installation, where they are rebuilt by hand."""
    package = damaged_package(tmp_path, OPS.name, OPS.read_bytes())
    (package / "_build.json").unlink()
    found = json.loads(use(package).stdout.splitlines()[-1])
    assert found == {"provider": "binary", "reasons": []}


def test_a_kernel_library_of_another_version_is_not_called(tmp_path):
    """One of a half rebuilt tree: loadable, with the structs of other Python files."""
    source = tmp_path / "other.c"
    library = tmp_path / "other.so"
    names = sorted(exports(KERNELS) - {"anyflash_layout"})
    functions = "".join(f"void {name}(void) {{}}\n" for name in names)
    source.write_text(f'{functions}const char* anyflash_layout(void) {{ return "TensorView 8"; }}')
    output("cc", "-shared", "-fPIC", source, "-o", library)
    package = damaged_package(tmp_path, KERNELS.name, library.read_bytes())
    (package / "_build.json").unlink()
    found = json.loads(use(package).stdout.splitlines()[-1])
    assert found["provider"] == "python"
    assert any("another version" in reason for reason in found["reasons"]), found


def test_an_operator_library_of_another_abi(tmp_path):
    """What an older torch would say: a symbol that this process does not have."""
    source = tmp_path / "other.c"
    source.write_text(
        "int aoti_torch_of_another_age(void);\n"
        "int anyflash_x(void) { return aoti_torch_of_another_age(); }\n"
    )
    library = tmp_path / "other.so"
    output("cc", "-shared", "-fPIC", "-Wl,-z,now", source, "-o", library)
    package = damaged_package(tmp_path, OPS.name, library.read_bytes())
    (package / "_build.json").unlink()
    done = use(package)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["provider"] == "python"
    assert any("aoti_torch_of_another_age" in reason for reason in found["reasons"]), found


SECOND_COPY = """
import ctypes, os, sys, torch, anyflash
from anyflash import _loader
q = torch.randn(1, 4, 2, 8)
before = anyflash.attention(q, q, q)
copy = os.environ["SECOND_COPY"]
torch.ops.load_library(copy)
error = ctypes.CDLL(copy).anyflash_register_error
error.restype = ctypes.c_char_p
assert error(), "the second copy registered as well"
assert torch.equal(anyflash.attention(q, q, q), before)
print(_loader.provider, error().decode())
"""


@pytest.mark.parametrize("provider", ["binary", "python"])
def test_a_second_copy_changes_nothing(tmp_path, provider):
    """The operators registered first stay, compiled or not; the newcomer reports why it is idle."""
    for path in (KERNELS, OPS):
        shutil.copy(path, tmp_path)
    environment = {"ANYFLASH_PROVIDER": provider, "SECOND_COPY": str(tmp_path / OPS.name)}
    done = use(damaged_package(tmp_path, OPS.name, OPS.read_bytes()), SECOND_COPY, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(provider)
