"""The CUDA kernels compile at run time too, with NVRTC, which has no standard headers."""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import os

import pytest
from tree import REPOSITORY, tracked

KERNELS = REPOSITORY / "kernels"
HEADERS = sorted(path.relative_to(KERNELS).as_posix() for path in tracked("kernels/**/*.cuh"))

# A kernel of each header that defines some: the dearest one.
INSTANTIATED = {
    "elementwise/bias_activation.cuh": [
        "bias_activation::forward_kernel<fp16, Activation::gelu_erf, false>",
        "bias_activation::backward_kernel<bf16, Activation::silu_gate, true>",
    ],
    "elementwise/kvcache_append.cuh": [
        "kvcache_append::kernel<bf16, 8>",
        "kvcache_append::kernel<fp32, 1>",
    ],
    "sm80/combine.cuh": ["sm80::combine_kernel<fp16>"],
    "sm80/decode.cuh": [
        "sm80::decode_kernel<bf16, 192, 128, Extras::score_mod, true>",
    ],
    "sm80/forward.cuh": [
        "sm80::forward_kernel<fp16, 64, 64, Extras::all, true, 100>",
    ],
}


@pytest.fixture(scope="module")
def nvrtc() -> ctypes.CDLL:
    """libnvrtc of NVIDIA's Python packages or of a toolkit."""
    spec = importlib.util.find_spec("nvidia")
    packages = (spec.submodule_search_locations or []) if spec else []
    folders = [f"{package}/*/lib" for package in packages]
    toolkits = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders += [f"{toolkit}/lib*" for toolkit in toolkits if toolkit]
    found = [path for folder in folders for path in glob.glob(f"{folder}/libnvrtc.so.*")]
    if not found:
        pytest.skip("no libnvrtc: it comes with torch for CUDA and with the CUDA toolkit")
    return ctypes.CDLL(found[0])


@pytest.mark.parametrize("header", HEADERS)
def test_headers_need_no_host_compiler(nvrtc, header):
    source = f'#include "kernels/{header}"\nusing namespace anyflash;\n'
    options = [b"-std=c++17", b"-arch=sm_80", f"-I{REPOSITORY}".encode()]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"a.cu", 0, None, None)
    for name in INSTANTIATED.get(header, []):
        nvrtc.nvrtcAddNameExpression(program, name.encode())
    array = (ctypes.c_char_p * len(options))(*options)
    failed = nvrtc.nvrtcCompileProgram(program, len(options), array)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    assert failed == 0, log.value.decode()


def test_every_header_with_kernels_is_instantiated():
    with_kernels = [name for name in HEADERS if "__global__" in (KERNELS / name).read_text()]
    assert with_kernels == sorted(INSTANTIATED)
