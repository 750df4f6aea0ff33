#!/usr/bin/env bash
# NVRTC 12.4.127 and 12.8.93: code for sm_90 and newer that waits for cp.async has three loads from shared memory which no source asks for and
# which never run: `@!PT LDS RZ, [RZ]`, before the barrier.
#
# One would guess that every LDS in the machine code is a load of the program, and that a load whose predicate is constantly false is
# removed. The kernel below reads shared memory once. For sm_80 the code says so; for sm_90, 100 and 120 it has four LDS, three of them under the
# predicate "not true" with address and result RZ. The same kernel that fills shared memory by ordinary stores has one on every architecture. They cost
# issue slots, once per barrier, and who counts loads, bank conflicts or instructions per product from machine code counts them too.
#
# Seen on 30 November 2026, x86_64 Linux, nvdisasm 13.5.37; LDS that run + LDS that never run, in the kernels with cp.async / with stores:
#   12.4.127 sm_80: 1+0 / 1+0
#   12.4.127 sm_90: 1+3 / 1+0
#   12.8.93 sm_80: 1+0 / 1+0
#   12.8.93 sm_90: 1+3 / 1+0
#   12.8.93 sm_100: 1+3 / 1+0
#   12.8.93 sm_120: 1+3 / 1+0
#
# Exits 0 while this is so, 1 when it changes, 2 when the packages cannot be installed. No GPU and no driver needed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps --target "$folder/$1" "$2" || exit 2; }
for version in 12.4.127 12.8.93; do pip "$version" "nvidia-cuda-nvrtc-cu12==$version"; done
pip nvdisasm "nvidia-cuda-nvdisasm==13.5.37"

cat > "$folder/count.py" <<'PY'
import ctypes
import glob
import re
import subprocess
import sys

folder = sys.argv[1]
SOURCE = rb"""
extern "C" __global__ void asynchronous(const char* source, float* out) {
  extern __shared__ char tile[];
  unsigned to = (unsigned)__cvta_generic_to_shared(tile) + threadIdx.x * 16;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(source + threadIdx.x * 16) : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  out[threadIdx.x] = ((float*)tile)[threadIdx.x ^ 1];
}
extern "C" __global__ void stored(const float4* source, float* out) {
  extern __shared__ char tile[];
  ((float4*)tile)[threadIdx.x] = source[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = ((float*)tile)[threadIdx.x ^ 1];
}
"""
(disassembler,) = [p for p in glob.glob(f"{folder}/nvdisasm/**/bin/nvdisasm", recursive=True)]


def compiled(version, arch):
    (path,) = glob.glob(f"{folder}/{version}/nvidia/cuda_nvrtc/lib/libnvrtc.so.12")
    lib = ctypes.CDLL(path)
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert lib.nvrtcCreateProgram(ctypes.byref(program), SOURCE, b"a.cu", 0, None, None) == 0
    flags = (ctypes.c_char_p * 1)(f"--gpu-architecture={arch}".encode())
    assert lib.nvrtcCompileProgram(program, 1, flags) == 0
    assert lib.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0
    code = ctypes.create_string_buffer(size.value)
    assert lib.nvrtcGetCUBIN(program, code) == 0
    return code.raw


def counts(version, arch):
    path = f"{folder}/{version}_{arch}.cubin"
    open(path, "wb").write(compiled(version, arch))
    text = subprocess.run([disassembler, "-c", path], capture_output=True, text=True, check=True).stdout
    found = []
    for kernel in ("asynchronous", "stored"):
        body = text.split(f".text.{kernel}:")[1].split(".text.")[0]
        loads = re.findall(r"(@!PT )?LDS[ .]", body)
        found.append(f"{loads.count('')}+{loads.count('@!PT ')}")
    return f"{version} {arch}: {' / '.join(found)}"


seen = [counts("12.4.127", a) for a in ("sm_80", "sm_90")]
seen += [counts("12.8.93", a) for a in ("sm_80", "sm_90", "sm_100", "sm_120")]
print("\n".join(seen))
expected = [f"{line.rsplit(':', 1)[0]}: {'1+0' if 'sm_80' in line else '1+3'} / 1+0" for line in seen]
sys.exit(seen != expected)
PY
"$folder/venv/bin/python" "$folder/count.py" "$folder"
