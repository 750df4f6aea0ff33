#!/usr/bin/env bash
# ziglang 0.17.1 (zig cc, x86_64-linux-gnu.2.17): __builtin_cpu_supports("avx2") is 0 on every CPU.
#
# The builtin is how a C library picks a kernel for the CPU it runs on; GCC and clang answer it from a table that their runtime library
# fills, also after an explicit __builtin_cpu_init(). zig's runtime library brings the table and never fills it: everything compiles and
# links without a word, and each program believes that the CPU has nothing. cpuid, asked in the same function, says what is there.
#
#   program: builtin 0, cpuid 1
#   shared library: builtin 0, cpuid 1
#
# Needs a CPU with AVX2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q ziglang==0.17.1
cat > "$folder/cpu.c" <<'C'
#include <cpuid.h>

int by_builtin(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") != 0;
}

int by_cpuid(void) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 5 & 1);
}
C
cat > "$folder/main.c" <<'C'
#include <stdio.h>

int by_builtin(void);
int by_cpuid(void);

int main(void) { printf("program: builtin %d, cpuid %d\n", by_builtin(), by_cpuid()); }
C
export ZIG_LOCAL_CACHE_DIR="$folder/local" ZIG_GLOBAL_CACHE_DIR="$folder/global"
zig() { "$folder/venv/bin/python" -m ziglang cc -target x86_64-linux-gnu.2.17 -O1 "$@"; }
zig "$folder/main.c" "$folder/cpu.c" -o "$folder/program"
zig -shared -fPIC "$folder/cpu.c" -o "$folder/libcpu.so"
{
  "$folder/program"
  "$folder/venv/bin/python" - "$folder/libcpu.so" <<'PY'
import ctypes
import sys

library = ctypes.CDLL(sys.argv[1])
print(f"shared library: builtin {library.by_builtin()}, cpuid {library.by_cpuid()}")
PY
} | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
program: builtin 0, cpuid 1
shared library: builtin 0, cpuid 1
SEEN
