// The matrix product in AMX's tiles: a tile of C is 16 rows of 16 floats, one of A 16 rows of 16
// Words, one of B 16 rows of 16 lanes, and one instruction multiplies them, pairs of bf16 into
// floats (TDPBF16PS, Intel's Software Developer's Manual, volume 2).
//
// What is left beside whole tiles goes through registers, so neither matrix is padded. A's steps
// have to lie side by side.
#pragma once

#include "kernels/cpu/product_registers.h"

#if defined(ANYFLASH_TILES)

namespace anyflash::cpu::ANYFLASH_ISA {

constexpr int kTile = 16;  // rows, Words, lanes

// The tiles of this thread, all of them whole, for as long as this lives.
class TileSetup {
 public:
  __attribute__((always_inline)) TileSetup() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.row_bytes[tile] = kTile * sizeof(Word);
      shapes.rows[tile] = kTile;
    }
    // GCC 12's _tile_loadconfig reads 8 bytes of it, as far as GCC knows.
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
  }
  __attribute__((always_inline)) ~TileSetup() { _tile_release(); }
  TileSetup(const TileSetup&) = delete;
  TileSetup& operator=(const TileSetup&) = delete;
};

struct TileProduct : Bf16Product {
  using Setup = TileSetup;
  static constexpr bool kTiles = true;
};

// kRows x kColumns tiles of C, two by two at most: they are the registers 0 to 3, A's are 4 and 5,
// B's 6 and 7.
template <Start kStart, int kRows, int kColumns>
ANYFLASH_INLINE void tile_block(const Operands& m, int row, int lane, int steps,
                                PrefetchWalk& ahead, int lines) {
  constexpr bool kTwoRows = kRows == 2, kTwoColumns = kColumns == 2;
  const int64_t a_row = m.a_row * 4, b_step = m.b_step * 4, c_row = m.c_row * 4;
  const Word *a = m.a + row * m.a_row, *a_next = a + kTile * m.a_row;
  const Word* b = m.b + lane;
  float *c = m.c + row * m.c_row + lane, *c_next = c + kTile * m.c_row;
  __asm__ volatile("" ::: "memory");  // GCC 12 lets stores sink below a tile's load
  if constexpr (kStart == Start::zero) {
    _tile_zero(0);
    if constexpr (kTwoColumns) _tile_zero(1);
    if constexpr (kTwoRows) _tile_zero(2);
    if constexpr (kTwoRows && kTwoColumns) _tile_zero(3);
  } else {
    _tile_loadd(0, c, c_row);
    if constexpr (kTwoColumns) _tile_loadd(1, c + kTile, c_row);
    if constexpr (kTwoRows) _tile_loadd(2, c_next, c_row);
    if constexpr (kTwoRows && kTwoColumns) _tile_loadd(3, c_next + kTile, c_row);
  }
  for (int step = 0; step < steps; step += kTile) {
    for (int line = 0; line < lines && ahead.left() > 0; ++line) ahead.prefetch_line();
    _tile_loadd(6, b, b_step);
    _tile_loadd(4, a, a_row);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoColumns) {
      _tile_loadd(7, b + kTile, b_step);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwoRows) {
      _tile_loadd(5, a_next, a_row);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kTwoRows && kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    a += kTile;
    a_next += kTile;
    b += kTile * m.b_step;
  }
  _tile_stored(0, c, c_row);
  if constexpr (kTwoColumns) _tile_stored(1, c + kTile, c_row);
  if constexpr (kTwoRows) _tile_stored(2, c_next, c_row);
  if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, c_next + kTile, c_row);
}

// kRows rows of tiles, all lanes. `lines` of `ahead` in each step: all at once, the tiles' loads
// would wait for them.
template <Start kStart, int kRows>
ANYFLASH_INLINE void tile_rows(const Operands& m, int row, int vectors, int steps,
                               PrefetchWalk& ahead, int lines) {
  int lane = 0;
  for (; lane + 2 * kTile <= vectors * kTile; lane += 2 * kTile) {
    tile_block<kStart, kRows, 2>(m, row, lane, steps, ahead, lines);
  }
  if (lane < vectors * kTile) tile_block<kStart, kRows, 1>(m, row, lane, steps, ahead, lines);
}

// C's rows times `scale`, where that is not 1 in all lanes.
ANYFLASH_INLINE void scale_rows(float* c, int64_t c_row, int rows, int vectors,
                                const float* scale) {
  for (int lane = 0; lane < vectors * kLanes; lane += kLanes) {
    const Float factor = load(scale + lane);
    if (largest_lane(maximum(factor - 1.0f, 1.0f - factor)) == 0) continue;
    float* at = c + lane;
    for (int row = 0; row < rows; ++row, at += c_row) store(at, load(at) * factor);
  }
}

// The largest of each lane. All vectors at once: one waits for its last maximum.
template <int kVectors>
ANYFLASH_INLINE void largest_of_rows(const float* c, int64_t c_row, int rows, int vectors,
                                     float* maxima) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) return largest_of_rows<kVectors - 1>(c, c_row, rows, vectors, maxima);
  }
  Float largest[kVectors];
  for (int v = 0; v < kVectors; ++v) largest[v] = broadcast(-kInfinity);
  for (int row = 0; row < rows; ++row, c += c_row) {
    for (int v = 0; v < kVectors; ++v) largest[v] = maximum(largest[v], load(c + v * kLanes));
  }
  for (int v = 0; v < kVectors; ++v) store(maxima + v * kLanes, largest[v]);
}

template <class Product, Start kStart, bool kMaximum>
static __attribute__((noinline)) void multiply_in_tiles(int vectors, const Operands& m,
                                                        const float* scale, float* maxima) {
  using InRegisters = typename Product::InRegisters;
  constexpr Start kTileStart = kStart == Start::zero ? Start::zero : Start::add;
  const int steps = m.steps / kTile * kTile;
  int rows = m.rows / kTile * kTile;
  if (rows == 0 || steps == 0) {
    return multiply_in_registers<InRegisters, kStart, kMaximum>(vectors, m, scale, maxima);
  }
  PrefetchWalk ahead(m.ahead);
  const int loads = (rows / kTile + 1) / 2 * ((vectors + 1) / 2) * (steps / kTile);
  const int lines = (ahead.left() + loads - 1) / loads;
  for (int row = 0; row < rows; row += 2 * kTile) {
    const int tiles = row + kTile < rows ? 2 : 1;
    if constexpr (kStart == Start::scaled) {
      scale_rows(m.c + row * m.c_row, m.c_row, tiles * kTile, vectors, scale);
    }
    if (tiles == 2) {
      tile_rows<kTileStart, 2>(m, row, vectors, steps, ahead, lines);
    } else {
      tile_rows<kTileStart, 1>(m, row, vectors, steps, ahead, lines);
    }
  }
  if (kStart == Start::zero && rows < m.rows) {  // nothing is lost if some are computed twice
    tile_rows<kTileStart, 1>(m, m.rows - kTile, vectors, steps, ahead, 0);
    rows = m.rows;
  }
  Operands rest = m;
  rest.ahead = {};
  if (steps < m.steps) {
    rest.rows = rows;
    rest.steps = m.steps - steps;
    rest.a = m.a + steps * m.a_step;
    rest.b = m.b + steps * m.b_step;
    multiply_in_registers<InRegisters, Start::add, false>(vectors, rest);
  }
  if (rows < m.rows) {
    rest = m;
    rest.ahead = {};
    rest.rows = m.rows - rows;
    rest.a = m.a + rows * m.a_row;
    rest.c = m.c + rows * m.c_row;
    multiply_in_registers<InRegisters, kStart, false>(vectors, rest, scale);
  }
  if constexpr (kMaximum) {
    largest_of_rows<kMaxVectors>(m.c, m.c_row, m.rows, vectors, maxima);
  }
}

}  // namespace anyflash::cpu::ANYFLASH_ISA

#endif
