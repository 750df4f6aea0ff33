// The one matrix product of all CPU kernels: C (rows x lanes) = [C *] + A B, C in registers.
//
// An element of A is broadcast to all lanes and meets whole vectors of B, so neither matrix is
// packed: A is addressed by two strides, B's rows are contiguous. Elements are Words: floats, or
// pairs of bf16 that one instruction multiplies and adds up.
#pragma once

#include "kernels/cpu/simd.h"

namespace anyflash::cpu::ANYFLASH_ISA {

struct Fp32Product {
  static constexpr int kPerWord = 1;
  static constexpr int kExp2Degree = 5;  // what the probabilities are worth
  ANYFLASH_INLINE Float multiply_add(Words a, Words b, Float c) { return (Float)a * (Float)b + c; }
};

struct Bf16Product {
  static constexpr int kPerWord = 2;
  static constexpr int kExp2Degree = 4;
  ANYFLASH_INLINE Float multiply_add(Words a, Words b, Float c) { return bf16_dot(a, b, c); }
};

// C's tile, in registers: 6 x 4 vectors where there are 32 registers, 6 x 2 where there are 16;
// more rows for narrower tiles, so that enough sums are in flight to hide the latency of an FMA.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxVectors = 4;
constexpr int rows_in_registers(int vectors) { return vectors <= 2 ? 12 : vectors == 3 ? 8 : 6; }
#else
constexpr int kMaxVectors = 2;
constexpr int rows_in_registers(int vectors) { return vectors == 1 ? 8 : 6; }
#endif

enum class Start { zero, add, scaled };  // C = A B, C + A B, C * scale + A B

// Rows that the next product needs, brought into the second-level cache meanwhile.
struct Prefetch {
  const void* const* rows;
  int count;
  int bytes;  // of a row
};

// a[row * a_row + step * a_step], b[step * b_step + lane], c[row * c_row + lane]
struct Operands {
  const Word* a;
  int64_t a_row;
  int64_t a_step;
  const Word* b;
  int64_t b_step;
  float* c;
  int64_t c_row;
  int rows;
  int steps;
  Prefetch ahead = {};
};

template <class Product, Start kStart, bool kMaximum, int kRows, int kVectors>
ANYFLASH_INLINE void register_tile(const Operands& m, int row, const Float* scale, Float* maxima) {
  Float sums[kRows][kVectors];
  float* c = m.c + row * m.c_row;
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Float{};
  }
  const Word* a = m.a + row * m.a_row;
  const Word* b = m.b;
  for (int step = 0; step < m.steps; ++step, a += m.a_step, b += m.b_step) {
    Words lanes[kVectors];
    for (int v = 0; v < kVectors; ++v) lanes[v] = load_words(b + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Words x = broadcast(a[r * m.a_row]);
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = Product::multiply_add(x, lanes[v], sums[r][v]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      // Block sums first: one running sum over many thousand steps would lose digits.
      const float* before = c + r * m.c_row + v * kLanes;
      if (kStart == Start::add) sums[r][v] = load(before) + sums[r][v];
      if (kStart == Start::scaled) sums[r][v] = multiply_add(load(before), scale[v], sums[r][v]);
      if (kMaximum) maxima[v] = maximum(maxima[v], sums[r][v]);
      store(c + r * m.c_row + v * kLanes, sums[r][v]);
    }
  }
}

// A few rows per register tile: all at once, they would wait for free line buffers, and the product
// with them.
ANYFLASH_INLINE void prefetch_part(const Prefetch& ahead, int tile, int tiles) {
  for (int i = ahead.count * tile / tiles; i < ahead.count * (tile + 1) / tiles; ++i) {
    const char* row = static_cast<const char*>(ahead.rows[i]);
    for (int byte = 0; byte < ahead.bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
}

// The last `rows` rows, fewer than a full tile.
template <class Product, Start kStart, bool kMaximum, int kRows, int kVectors>
ANYFLASH_INLINE void last_rows(const Operands& m, int rows, const Float* scale, Float* maxima) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      register_tile<Product, kStart, kMaximum, kRows, kVectors>(m, m.rows - kRows, scale, maxima);
    } else {
      last_rows<Product, kStart, kMaximum, kRows - 1, kVectors>(m, rows, scale, maxima);
    }
  }
}

// `scale` and `maxima` hold kVectors vectors, for Start::scaled and kMaximum alone; maxima: of each
// lane over the rows.
template <class Product, Start kStart, bool kMaximum, int kVectors>
static __attribute__((noinline)) void multiply(const Operands& operands, const float* scale,
                                               float* maxima) {
  constexpr int kRows = rows_in_registers(kVectors);
  const Operands m = operands;
  Float scales[kVectors], largest[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    if (kStart == Start::scaled) scales[v] = load(scale + v * kLanes);
    largest[v] = broadcast(-kInfinity);
  }
  int row = 0;
  for (int tile = 0, tiles = m.rows / kRows; tile < tiles; ++tile, row += kRows) {
    prefetch_part(m.ahead, tile, tiles);
    register_tile<Product, kStart, kMaximum, kRows, kVectors>(m, row, scales, largest);
  }
  last_rows<Product, kStart, kMaximum, kRows - 1, kVectors>(m, m.rows - row, scales, largest);
  if (kMaximum) {
    for (int v = 0; v < kVectors; ++v) store(maxima + v * kLanes, largest[v]);
  }
}

// The same for any number of vectors of lanes up to kMaxVectors.
template <class Product, Start kStart, bool kMaximum, int kVectors = kMaxVectors>
ANYFLASH_INLINE void multiply(int vectors, const Operands& m, const float* scale = nullptr,
                              float* maxima = nullptr) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) {
      return multiply<Product, kStart, kMaximum, kVectors - 1>(vectors, m, scale, maxima);
    }
  }
  multiply<Product, kStart, kMaximum, kVectors>(m, scale, maxima);
}

// The same for any multiple of kLanes columns.
template <class Product, Start kStart>
ANYFLASH_INLINE void multiply_wide(int columns, Operands m) {
  for (int column = 0; column < columns; column += kMaxVectors * kLanes) {
    const int left = (columns - column) / kLanes;
    multiply<Product, kStart, false>(left < kMaxVectors ? left : kMaxVectors, m);
    m.b += kMaxVectors * kLanes;
    m.c += kMaxVectors * kLanes;
  }
}

}  // namespace anyflash::cpu::ANYFLASH_ISA
