#!/usr/bin/env bash
# GCC 12.2 -O2: its AMX intrinsics read memory that GCC does not know they read, so stores before them are deleted.
#
# _tile_loadconfig reads 64 bytes and tells GCC of 8, _tile_loadd reads a whole tile and tells GCC of nothing; both are written as inline
# assembly without a clobber of memory. A configuration that is filled field by field just before loses the fields behind the eighth byte:
# the processor is given what the stack holds. A number written to an array just before a tile of it is loaded, and overwritten later, is
# never written. There is no warning. With a compiler barrier before the intrinsic the stores are there.
#
#   configuration, rows of eight tiles stored: no; with a barrier: yes
#   number of a tile stored before its load: no; with a barrier: yes
#
# Only compiles; needs gcc 12 (gcc-12, or as gcc), no CPU with AMX.
set -euo pipefail
gcc=$(command -v gcc-12 || command -v gcc)
"$gcc" -dumpfullversion | grep -q '^12\.' || { echo "needs gcc 12"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/tiles.c" <<'C'
#include <immintrin.h>

#ifdef WITH_BARRIER
#define BARRIER(p) __asm__ volatile("" : : "r"(p) : "memory")
#else
#define BARRIER(p) (void)(p)
#endif

void configure(void) {
  struct {
    unsigned char palette, start_row, reserved[14];
    unsigned short row_bytes[16];
    unsigned char rows[16];
  } shapes = {1};
  for (int tile = 0; tile < 8; ++tile) {
    shapes.row_bytes[tile] = 64;
    shapes.rows[tile] = 16;
  }
  BARRIER(&shapes);
  _tile_loadconfig(&shapes);
}

void load(int* numbers) {
  numbers[0] = 12345;
  BARRIER(numbers);
  _tile_loadd(0, numbers, 64);
  numbers[0] = 0;
}
C
stores() {
  local text
  text=$("$gcc" -O2 -mamx-tile -S -o - "$@" "$folder/tiles.c")
  # eight bytes of 16; the number
  for constant in 1157442765409226768 12345; do
    grep -q "\$$constant" <<< "$text" && echo yes || echo no
  done
}
mapfile -t plain < <(stores)
mapfile -t barrier < <(stores -DWITH_BARRIER)
echo "configuration, rows of eight tiles stored: ${plain[0]}; with a barrier: ${barrier[0]}"
echo "number of a tile stored before its load: ${plain[1]}; with a barrier: ${barrier[1]}"
[[ "${plain[*]}" == "no no" && "${barrier[*]}" == "yes yes" ]]
