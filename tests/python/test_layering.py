"""The rules of the layers, by reading the files: who includes what, and what no text says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from tree import REPOSITORY, text_of, tracked

CODE = {".h", ".cpp", ".cu", ".cuh", ".in"}
STABLE_HEADERS = ("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/", "torch/headeronly/")
PACKAGE = REPOSITORY / "python/anyflash"


def _sources(folder: str) -> list[Path]:
    return [path for path in tracked(f"{folder}/**") if path.suffix in CODE]


def _includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


def test_kernels_know_nothing_of_torch():
    for path in _sources("kernels"):
        for name in _includes(path):
            assert not re.match(r"(torch|ATen|c10|caffe2)/", name), f"{path}: {name}"
            assert not name.startswith("csrc/"), f"{path} looks up: {name}"


@pytest.mark.parametrize("folder", ["kernels", "core", "csrc", "include"])
def test_what_ships_knows_nothing_of_its_tests(folder):
    for path in _sources(folder):
        found = re.search(r"\b(tests|emulator)/.*", path.read_text())
        assert not found, f"{path}: {found[0]}"


def test_emulator_knows_nothing_of_the_library():
    for path in _sources("emulator"):
        for name in _includes(path):
            assert not name.startswith(("kernels/", "csrc/")), f"{path}: {name}"
            assert not name.startswith("tests/") or name == "tests/cpp/catch.h", f"{path}: {name}"


def test_kernels_use_no_standard_headers_on_the_device():
    """They must compile with NVRTC too."""
    for path in tracked("kernels/**/*.cuh"):
        for name in _includes(path):
            assert "/" in name or name.endswith((".h", ".cuh")), f"{path}: <{name}>"
            assert name != "cuda.h", f"{path}: {name}"


def test_operators_have_no_device_code():
    for path in _sources("csrc"):
        assert "__global__" not in path.read_text(), path
        assert path.suffix not in (".cu", ".cuh"), path


def test_operators_include_only_stable_headers_of_torch():
    for path in _sources("csrc"):
        for name in _includes(path):
            if re.match(r"(torch|ATen|c10|caffe2)/", name):
                assert name.startswith(STABLE_HEADERS), f"{path}: {name}"


def test_the_core_is_free_of_torch_and_knows_nothing_above_it():
    for path in _sources("core"):
        for name in _includes(path):
            assert not name.startswith(("torch/", "ATen/", "c10/", "csrc/", "tests/")), path
            own = name.startswith(("core/", "kernels/")) or name == "anyflash/kernels.h"
            assert own or "/" not in name or name.startswith("sys/"), f"{path}: {name}"


def test_the_header_of_the_kernels_is_free_of_torch_and_complete():
    """It includes what csrc/CMakeLists.txt installs, and that nothing else."""
    listed = re.search(
        r"ANYFLASH_KERNEL_HEADERS ([^)]*)", (REPOSITORY / "csrc/CMakeLists.txt").read_text()
    )
    installed = {f"kernels/{name}" for name in listed[1].split()}
    found, waiting = set(), ["include/anyflash/kernels.h"]
    while waiting:
        names = {name for name in _includes(REPOSITORY / waiting.pop()) if "/" in name}
        waiting += names - found
        found |= names
    assert found == installed


def test_only_the_stable_folder_meets_the_registrar_macros():
    for path in _sources("csrc"):
        text = re.sub(r"//.*", "", path.read_text())
        assert "STABLE_TORCH_LIBRARY" not in text, path
        assert "TORCH_LIBRARY" not in text, path


def test_no_libraries_of_cuda_are_included():
    for path in _sources("core") + _sources("csrc") + _sources("kernels"):
        for name in _includes(path):
            assert not re.match(r"(cublas|cudnn|cusparse|cusolver|nccl)", name), f"{path}: {name}"


def _imports(path: Path) -> set[str]:
    """Names of imported modules; relative ones with their dots resolved."""
    package = ["anyflash", *path.relative_to(PACKAGE).parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_engine_never_looks_up():
    """anyflash does not import the drop-in, tools or tests; they import it."""
    for path in tracked("python/anyflash/**/*.py"):
        parts = path.relative_to(PACKAGE).parts
        if parts[0] in ("dropin", "demo"):
            continue
        for name in _imports(path):
            assert not re.match(r"flash_attn(\.|$|_)", name), f"{path}: {name}"
            assert not name.startswith("anyflash.dropin"), f"{path}: {name}"


def test_python_provider_uses_nothing_above_the_operators():
    above = {path.stem for path in tracked("python/anyflash/[!_]*.py")} - {"backends"}
    above |= {"_autograd", "_ops", "_operators", "_doctor", "dropin", "integrations"}
    for path in tracked("python/anyflash/_python_ops/**/*.py"):
        for name in _imports(path):
            parts = name.split(".")
            outside = parts[0] == "anyflash" and parts[1:2] != ["_python_ops"]
            assert not (outside and parts[1:2] and parts[1] in above), f"{path}: {name}"


def test_testing_calls_no_operator_of_the_library():
    for path in tracked("python/*/testing*.py"):
        code = ast.dump(ast.parse(path.read_text()))
        assert "attr='ops'" not in code, path
        for name in _imports(path):
            own = name.startswith("anyflash.") and not name.startswith("anyflash.testing")
            assert not own, f"{path}: {name}"


def test_dropin_has_no_algorithms():
    """The drop-in names things and calls the engine; matrix products are not its job."""
    for path in tracked("python/anyflash/dropin/**/flash_attn_interface.py"):
        text = path.read_text()
        for word in ("softmax(", "matmul(", "einsum(", "scaled_dot_product_attention(", " @ "):
            assert word not in re.sub(r'""".*?"""', "", text, flags=re.DOTALL), f"{path}: {word}"


# Who may read a tensor on the host: checks that ANYFLASH_CHECK asks for, CPU code, and numbers that
# callers give as tensors.
HOST_READERS = {
    "_core.py": "put_with_values",
    "_flops.py": "_lengths",
    "_numbers.py": "_element",
    "cross_entropy.py": "_are_unequal",
    "runs.py": "runs_of",
    "without_core.py": "_check_lengths",
}


def test_no_device_synchronisation_in_the_operators():
    """.item(), .tolist() and .cpu() wait for a GPU: allowed in the functions listed alone."""
    waits = re.compile(r"\.(item|tolist|cpu|numpy|nonzero)\(")
    folders = ("anyflash", "anyflash/_operators", "anyflash/_python_ops")
    for path in tracked(*(f"python/{folder}/*.py" for folder in folders)):
        if path.name.startswith("testing"):
            continue
        text = path.read_text()
        allowed = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name == HOST_READERS.get(path.name):
                allowed |= set(range(node.lineno, node.end_lineno + 1))
        for number, line in enumerate(text.splitlines(), 1):
            assert number in allowed or not waits.search(line), f"{path}:{number}: {line}"


HOSTS = r"pypi\.org|pythonhosted\.org|pypi\.nvidia\.com|download\.pytorch\.org|conda\.anaconda\.org"
MACHINE = r"(?<![\w./-])/(?:root|home/\w+|work|tmp)/\w|(?<![\w])C:\\\\Users"


def test_no_machine_paths_or_registry_hosts():
    found = []
    for path in tracked("**"):
        text = text_of(path)
        if text is None or path == Path(__file__):
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if re.search(HOSTS, line) or re.search(MACHINE, line):
                found.append(f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_no_debts_in_the_code():
    """What is committed is done."""
    words = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    for path in tracked("**"):
        text = text_of(path)
        if text is None or path.suffix not in {".py", ".h", ".cpp", ".cu", ".cuh", ".def", ".txt"}:
            continue
        assert not words.search(text), path


LONGEST_FILE, LONGEST_FUNCTION = 420, 80


@pytest.mark.parametrize(
    "folder",
    ["python", "emulator", "tests/python", "tests/emulated", "tools", "scripts", "benchmarks"],
)
def test_files_and_functions_stay_readable(folder):
    for path in tracked(f"{folder}/**/*.py"):
        if path.name == "testing_cases.py":  # data
            continue
        text = path.read_text()
        limit = LONGEST_FILE + 120 * path.name.startswith("test_")
        assert text.count("\n") <= limit, f"{path}: {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                code = [
                    s for s in node.body if not isinstance(getattr(s, "value", None), ast.Constant)
                ]
                length = node.end_lineno - code[0].lineno + 1 if code else 0
                assert length <= LONGEST_FUNCTION, f"{path}: {node.name} has {length} lines"


def test_package_supports_old_pythons():
    """Python 3.9 reads it: no match statement, no runtime use of newer syntax."""
    for path in tracked("python/anyflash/**/*.py"):
        ast.parse(path.read_text(), feature_version=(3, 9))
        if re.search(r"\w \| (None|\w+)", path.read_text()) and "annotations" in path.read_text():
            assert "from __future__ import annotations" in path.read_text(), path


def test_every_python_file_says_what_it_is():
    for path in tracked("python/anyflash/**/*.py"):
        if path.name != "__init__.py" and path.stat().st_size:
            assert ast.get_docstring(ast.parse(path.read_text())), path
