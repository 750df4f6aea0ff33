#!/usr/bin/env bash
# NVRTC 12.8.93: one compiler writes two layouts of machine code, by the GPU that it compiles for.
#
# One would guess that a cubin's ELF ABI follows the compiler's version, so that whatever 12.8 makes is read, or refused, by the same
# drivers. It follows the architecture: code for sm_80 and sm_90 has OS/ABI 0x33, ABI version 7, and the architecture in the lowest
# byte of e_flags, as every NVRTC since 12.0 wrote it; code for sm_100 and sm_120 has OS/ABI 0x41, ABI version 8, and the architecture
# in the second byte. NVRTC 13.0.88 then writes the new layout for sm_80 and sm_90 too. So a tool that reads the architecture of a
# cubin must look at the ABI version first, not at the toolkit's; and the same source, rebuilt by CUDA 13, is another file format for
# the same GPU.
#
# Seen on 30 November 2026, x86_64 Linux:
#   12.8 sm_80: OS/ABI 0x33, version 7, flags 0x500550
#   12.8 sm_90: OS/ABI 0x33, version 7, flags 0x5a055a
#   12.8 sm_100: OS/ABI 0x41, version 8, flags 0x6006402
#   12.8 sm_120: OS/ABI 0x41, version 8, flags 0x6007802
#   13.0 sm_80: OS/ABI 0x41, version 8, flags 0x6005004
#   13.0 sm_90: OS/ABI 0x41, version 8, flags 0x6005a04
#
# Exits 0 while this is so, 1 when it changes, 2 when the packages cannot be installed. No GPU and no driver needed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps)
"${pip[@]}" --target "$folder/12.8" nvidia-cuda-nvrtc-cu12==12.8.93 || exit 2
"${pip[@]}" --target "$folder/13.0" nvidia-cuda-nvrtc==13.0.88 || exit 2

cat > "$folder/layout.py" <<'PY'
import ctypes
import glob
import struct
import sys


def cubin(library, arch):
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source = b"__global__ void kernel(float* x) { x[threadIdx.x] *= 2; }"
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, b"kernel.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 1)(f"-arch={arch}".encode())
    assert library.nvrtcCompileProgram(program, 1, options) == 0
    assert library.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0
    code = ctypes.create_string_buffer(size.value)
    assert library.nvrtcGetCUBIN(program, code) == 0
    return code.raw


expected = {
    ("12.8", "sm_80"): (0x33, 7, 0x500550),
    ("12.8", "sm_90"): (0x33, 7, 0x5A055A),
    ("12.8", "sm_100"): (0x41, 8, 0x6006402),
    ("12.8", "sm_120"): (0x41, 8, 0x6007802),
    ("13.0", "sm_80"): (0x41, 8, 0x6005004),
    ("13.0", "sm_90"): (0x41, 8, 0x6005A04),
}
same = True
for (version, arch), layout in expected.items():
    (path,) = glob.glob(f"{sys.argv[1]}/{version}/nvidia/*/lib/libnvrtc.so.1?")
    code = cubin(ctypes.CDLL(path), arch)
    seen = (code[7], code[8], struct.unpack_from("<I", code, 48)[0])
    print(f"{version} {arch}: OS/ABI {seen[0]:#x}, version {seen[1]}, flags {seen[2]:#x}")
    same = same and seen == layout
sys.exit(0 if same else 1)
PY
"$folder/venv/bin/python" "$folder/layout.py" "$folder"
