"""What the CUDA compiler made of the kernels: registers, spills, and the width of memory accesses.

Compiles every kernel family for each architecture; needs nvcc, and nvdisasm for the tests that
read machine code.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
ARCHS = ("75", "80", "90")
DTYPES = ("fp16", "bf16", "fp32")

# Kernel -> most registers per thread. A multiprocessor holds 65536 / (256 threads * registers)
# blocks.
REGISTER_BUDGET = {
    "forward": 64,
    "backward": 64,
    "gated forward": 64,
    "gated backward": 128,
    "sum": 64,
}

SOURCE = """
#include "kernels/elementwise/bias_activation.cuh"
namespace anyflash::bias_activation {{
{}
}}
""".format(
    "\n".join(
        f"template int32_t launch_{direction}<{dtype}>(const BiasActivationParams&, void*);"
        for direction in ("forward", "backward")
        for dtype in DTYPES
    )
)


class Kernel(NamedTuple):
    """One kernel as ptxas describes it."""

    name: str
    kind: str  # a key of REGISTER_BUDGET
    vectorised: bool
    registers: int
    spilled_bytes: int


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on the path, of a toolkit, or of NVIDIA's Python packages."""
    folders = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    folders.append("/usr/local/cuda")
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or []) if spec else []:
        folders.append(os.path.join(location, "cu13"))
    paths = [os.path.join(folder, "bin", name) for folder in folders]
    return shutil.which(name) or next((p for p in paths if os.access(p, os.X_OK)), None)


def kind_of(name: str) -> str:
    """Which row of REGISTER_BUDGET a mangled kernel name belongs to."""
    if "sum_partials" in name:
        return "sum"
    direction = "backward" if "backward_kernel" in name else "forward"
    return f"gated {direction}" if "ActivationE4" in name else direction


def parse_ptxas(log: str) -> list[Kernel]:
    """The kernels in the output of ptxas -v."""
    pattern = (
        r"entry function '(\S+)' for 'sm_\w+'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    return [
        Kernel(name, kind_of(name), "Lb1E" in name, int(registers), int(stored) + int(loaded))
        for name, stored, loaded, registers in re.findall(pattern, log, re.S)
    ]


def parse_sass(text: str) -> dict[str, list[str]]:
    """Mangled kernel name -> its instructions, from nvdisasm."""
    kernels: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        section = re.match(r"\.text\.(\w+):", line)
        if section:
            current = kernels.setdefault(section.group(1), [])
        instruction = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?\s*([A-Z][\w.]*)", line)
        if instruction:
            current.append(instruction.group(1))
    return kernels


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory):
    """arch -> (kernels, path of the cubin), compiled when first asked for."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: the kernels cannot be compiled here")
    folder = tmp_path_factory.mktemp("sass")
    (folder / "kernels.cu").write_text(SOURCE)

    @functools.cache
    def compile_for(arch: str) -> tuple[list[Kernel], pathlib.Path]:
        cubin = folder / f"sm_{arch}.cubin"
        command = [nvcc, "-std=c++17", f"-I{ROOT}", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin"]
        command += ["-Werror=all-warnings", "-o", str(cubin), str(folder / "kernels.cu")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return parse_ptxas(done.stdout + done.stderr), cubin

    return compile_for


@pytest.fixture(scope="module")
def sass(compiled):
    """arch -> {kernel: instructions}."""
    nvdisasm = find_tool("nvdisasm")
    if nvdisasm is None:
        pytest.skip(
            "no nvdisasm (Python package nvidia-cuda-nvdisasm): machine code cannot be read"
        )

    @functools.cache
    def read(arch: str) -> dict[str, list[str]]:
        command = [nvdisasm, "-c", str(compiled(arch)[1])]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return parse_sass(done.stdout)

    return read


@pytest.mark.parametrize("arch", ARCHS)
def test_all_kernels_are_there(compiled, arch):
    kernels, _ = compiled(arch)
    # 3 dtypes x 5 activations x 2 directions x (vectorised or not), and one sum per dtype
    assert len(kernels) == 3 * 5 * 2 * 2 + 3
    assert {kernel.kind for kernel in kernels} == set(REGISTER_BUDGET)


@pytest.mark.parametrize("arch", ARCHS)
def test_no_spills(compiled, arch):
    assert [kernel for kernel in compiled(arch)[0] if kernel.spilled_bytes] == []


@pytest.mark.parametrize("arch", ARCHS)
def test_register_budget(compiled, arch):
    over = [k for k in compiled(arch)[0] if k.registers > REGISTER_BUDGET[k.kind]]
    assert over == []


@pytest.mark.parametrize("arch", ARCHS)
def test_no_local_memory(sass, arch):
    for name, instructions in sass(arch).items():
        assert [i for i in instructions if i.startswith(("LDL", "STL"))] == [], name


@pytest.mark.parametrize("arch", ARCHS)
def test_vectorised_kernels_use_16_byte_accesses(sass, compiled, arch):
    instructions = sass(arch)
    for kernel in compiled(arch)[0]:
        wide = [i for i in instructions[kernel.name] if re.match(r"(LDG|STG)\.E\.128", i)]
        loads = sum(i.startswith("LDG") for i in wide)
        stores = len(wide) - loads
        if not kernel.vectorised:
            assert wide == [], kernel.name
            continue
        # per thread two rows of each operand, and the bias once
        operands = {"forward": 1, "gated forward": 2, "backward": 2, "gated backward": 3}
        results = {"forward": 1, "gated forward": 1, "backward": 1, "gated backward": 2}
        biases = 2 if kernel.kind.startswith("gated") else 1
        assert loads == 2 * operands[kernel.kind] + biases, kernel.name
        assert stores == 2 * results[kernel.kind], kernel.name


def test_kernel_sources_need_no_host_compiler():
    """NVRTC, which has no standard headers, compiles them too."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [path for folder in folders for path in glob.glob(f"{folder}/*/lib/libnvrtc.so.*")]
    if not found:
        pytest.skip("no libnvrtc (it comes with torch for CUDA)")
    nvrtc = ctypes.CDLL(found[0])
    header = b'#include "kernels/elementwise/bias_activation.cuh"\n'
    kernel = (
        b"anyflash::bias_activation::backward_kernel<anyflash::bf16, anyflash::Activation(4), true>"
    )
    options = (ctypes.c_char_p * 3)(b"-std=c++17", b"-arch=sm_80", f"-I{ROOT}".encode())
    program = ctypes.c_void_p()
    size = ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), header, b"kernels.cu", 0, None, None)
    nvrtc.nvrtcAddNameExpression(program, kernel)
    failed = nvrtc.nvrtcCompileProgram(program, len(options), options)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert failed == 0, log.value.decode()


def test_ptxas_parser():
    log = (
        "ptxas info    : Compiling entry function '_Z14forward_kernelLb1E' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z14forward_kernelLb1E\n"
        "    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 0 barriers\n"
    )
    assert parse_ptxas(log) == [Kernel("_Z14forward_kernelLb1E", "forward", True, 40, 12)]


def test_sass_parser():
    text = (
        ".text._Zk:\n"
        "        /*0000*/                   LDG.E.128 R4, [R2.64] ;\n"
        "        /*0010*/              @!P0 STL [R1], R4 ;\n"
    )
    assert parse_sass(text) == {"_Zk": ["LDG.E.128", "STL"]}
