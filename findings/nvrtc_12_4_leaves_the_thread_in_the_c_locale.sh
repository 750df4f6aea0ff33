#!/usr/bin/env bash
# NVRTC 12.4.127: after nvrtcCompileProgram the calling thread stays in the C locale.
#
# One would guess that a compiler in a library leaves the process as it found it, and setlocale() agrees: it still says C.UTF-8. But the
# thread's own locale (uselocale) is C, so nl_langinfo(CODESET) is ASCII, and whatever asks for the locale's encoding afterwards gets
# that: Python's open() and subprocess without an encoding then fail at the first character beyond ASCII. It lasts until something calls
# uselocale again, and other threads do not have it. NVRTC 12.8.93 puts the locale back. Anything that compiles at run time with CUDA
# 12.4 (jiterator and fused kernels among them) can hand this to unrelated code that runs later.
#
# Seen on 30 November 2026, x86_64 Linux, Python 3.11, LC_ALL=C.UTF-8:
#   12.4.127: setlocale C.UTF-8, encoding UTF-8 -> setlocale C.UTF-8, encoding ANSI_X3.4-1968
#   12.8.93: setlocale C.UTF-8, encoding UTF-8 -> setlocale C.UTF-8, encoding UTF-8
#
# Exits 0 while this is so, 1 when it changes, 2 when the packages cannot be installed. No GPU and no driver needed.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
export LC_ALL=C.UTF-8
python3 -m venv "$folder/venv"
for version in 12.4.127 12.8.93; do
  "$folder/venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps --target "$folder/$version" \
    "nvidia-cuda-nvrtc-cu12==$version" || exit 2
done

cat > "$folder/locale_after.py" <<'PY'
import ctypes
import glob
import locale
import sys

folder, version = sys.argv[1:]
locale.setlocale(locale.LC_ALL, "")


def state():
    return f"setlocale {locale.setlocale(locale.LC_ALL)}, encoding {locale.nl_langinfo(locale.CODESET)}"


before = state()
(path,) = glob.glob(f"{folder}/{version}/nvidia/cuda_nvrtc/lib/libnvrtc.so.12")
library, program = ctypes.CDLL(path), ctypes.c_void_p()
source = b"__global__ void kernel(float* x) { x[threadIdx.x] *= 2; }"
assert library.nvrtcCreateProgram(ctypes.byref(program), source, b"kernel.cu", 0, None, None) == 0
assert library.nvrtcCompileProgram(program, 1, (ctypes.c_char_p * 1)(b"-arch=sm_80")) == 0
print(f"{version}: {before} -> {state()}")
PY
for version in 12.4.127 12.8.93; do
  "$folder/venv/bin/python" "$folder/locale_after.py" "$folder" "$version"
done | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
12.4.127: setlocale C.UTF-8, encoding UTF-8 -> setlocale C.UTF-8, encoding ANSI_X3.4-1968
12.8.93: setlocale C.UTF-8, encoding UTF-8 -> setlocale C.UTF-8, encoding UTF-8
SEEN
