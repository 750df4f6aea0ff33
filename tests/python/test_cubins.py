"""The machine code in the installed library, read as a driver reads it."""

from __future__ import annotations

import hashlib
import re
import struct
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from support import REPOSITORY

from anyflash import _core, _loader

sys.path.append(str(REPOSITORY / "tools"))
import embed_code  # noqa: E402

if _loader.provider != "binary":
    pytest.skip("anyflash runs without the binary", allow_module_level=True)


def cubins_of_lines() -> dict[str, list]:
    """Line of instances.def to its records of kernels/cubin.h."""
    lines = {line.name.decode(): list(_core.cubins(line)) for line in _core.table()}
    return {name: found for name, found in lines.items() if found}


LINES = cubins_of_lines()
if not LINES:
    pytest.skip("this build has no CUDA kernels", allow_module_level=True)

CUDA_MACHINE = 190  # EM_CUDA

# In every driver since R525, which knows CUDA 12.0.
OLD_FUNCTIONS = {
    "cuCtxGetCurrent", "cuCtxGetDevice", "cuCtxGetId", "cuCtxSetCurrent", "cuDeviceGet",
    "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuDriverGetVersion",
    "cuFuncSetAttribute", "cuGetErrorName", "cuGetErrorString", "cuInit", "cuLaunchKernel",
    "cuModuleGetFunction", "cuModuleLoadData", "cuThreadExchangeStreamCaptureMode",
}  # fmt: skip


class Image(NamedTuple):
    """What an ELF file for GPUs says."""

    abi: int
    sm: int
    kernels: set[str]


def read(code: bytes) -> Image:
    """Of a cubin. Up to version 7 of the ABI, which drivers of CUDA 12.0 read, the flags begin with
    the architecture; from 8 on, which those of 12.8 read, it is their second byte."""
    assert code[:4] == b"\x7fELF"
    (machine,) = struct.unpack_from("<H", code, 18)
    assert machine == CUDA_MACHINE
    (flags,) = struct.unpack_from("<I", code, 48)
    abi = code[8]
    names = re.findall(rb"\.text\.(\w+)\0", code)
    return Image(abi, flags >> (8 if abi >= 8 else 0) & 0xFF, {name.decode() for name in names})


@pytest.mark.parametrize("line", LINES)
def test_code_is_for_the_architectures_and_drivers_that_it_says(line):
    for cubin in LINES[line]:
        image = read(_core.machine_code(cubin))
        assert image.sm == cubin.sm
        assert cubin.min_driver == {7: 12000, 8: 13000 if cubin.sm < 100 else 12080}[image.abi]


@pytest.mark.parametrize("line", LINES)
def test_code_has_the_kernels_of_its_line_alone(line):
    others = {"fp16", "bf16"} - {re.search("fp16|bf16|fp32", line)[0]}
    for cubin in LINES[line]:
        kernels = read(_core.machine_code(cubin)).kernels
        assert kernels
        assert not [name for name in kernels for other in others if f"4{other}" in name]


def test_what_is_kept_of_similar_code():
    like = bytes(range(256)) * 8
    code = bytearray(like)
    code[3], code[1000] = 0, 7
    kept = embed_code.changes(bytes(code), like)
    assert kept == [3 << 8 | 0, 1000 << 8 | 7]
    assert embed_code.changes(bytes(code[:-1]), like) is None
    assert embed_code.changes(bytes(reversed(like)), like) is None


def test_trust_is_in_the_very_code():
    digest = hashlib.sha256(b"code").hexdigest()[:16]
    records = f"CHECKED(a_line, 90, {digest})\nCHECKED(a_line, 80, {digest})\n"
    assert embed_code.checked_on("a_line", b"code", records) == [80, 90]
    assert embed_code.checked_on("a_line", b"changed", records) == []
    assert embed_code.checked_on("line", b"code", records) == []


def test_few_drivers_are_too_old():
    """Where the compilers of the release made it; others may write what only newer drivers read."""
    if _core.build_info()["nvrtc"] not in ("12.4", "12.4, 12.8"):
        pytest.skip(f"built with NVRTC {_core.build_info()['nvrtc']}")
    least = {cubin.sm: cubin.min_driver for found in LINES.values() for cubin in found}
    assert least == {sm: 12000 if sm < 100 else 12080 for sm in least}


def test_of_the_driver_only_old_functions_are_asked_for():
    names = set(re.findall(rb"\0(cu[A-Z]\w+)(?=\0)", Path(_core.loaded()._name).read_bytes()))
    assert {name.decode() for name in names} == OLD_FUNCTIONS
