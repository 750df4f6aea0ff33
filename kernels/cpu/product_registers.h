// The matrix product in vector registers.
//
// An element of A is broadcast to all lanes and meets whole vectors of B, so neither matrix is
// packed: A is addressed by two strides, B's rows are contiguous. Elements are Words: floats, or
// pairs of bf16 that one instruction multiplies and adds up.
#pragma once

#include "kernels/cpu/simd.h"

namespace anyflash::cpu::ANYFLASH_ISA {

// What a thread that computes with a product has at hand meanwhile.
struct NoSetup {};

struct Fp32Product {
  using Setup = NoSetup;
  using InRegisters = Fp32Product;
  static constexpr bool kTiles = false;
  static constexpr int kPerWord = 1;
  static constexpr int kExp2Degree = 5;  // what the probabilities are worth
  ANYFLASH_INLINE Float multiply_add(Words a, Words b, Float c) { return (Float)a * (Float)b + c; }
};

struct Bf16Product {
  using Setup = NoSetup;
  using InRegisters = Bf16Product;
  static constexpr bool kTiles = false;
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

// Rows that the next product needs, brought into the second-level cache meanwhile: lines
// [begin, end) of all their cache lines, one row after the other.
struct Prefetch {
  const void* const* rows;
  int row_lines;
  int begin;
  int end;

  // The i-th of so many parts.
  __attribute__((always_inline)) Prefetch part(int i, int parts) const {
    const int lines = end - begin;
    return {rows, row_lines, begin + lines * i / parts, begin + lines * (i + 1) / parts};
  }
};

// The way through a prefetch, without a division per line.
class PrefetchWalk {
 public:
  __attribute__((always_inline)) explicit PrefetchWalk(const Prefetch& ahead)
      : row_lines_(ahead.row_lines), left_(ahead.end - ahead.begin) {
    if (left_ == 0) return;
    const int line = ahead.begin % row_lines_;
    row_ = ahead.rows + ahead.begin / row_lines_;
    next_ = static_cast<const char*>(*row_++) + line * 64;
    left_in_row_ = row_lines_ - line;
  }

  __attribute__((always_inline)) int left() const { return left_; }

  __attribute__((always_inline)) void prefetch_line() {
    if (left_in_row_ == 0) {
      next_ = static_cast<const char*>(*row_++);
      left_in_row_ = row_lines_;
    }
    __builtin_prefetch(next_, 0, 2);
    next_ += 64;
    --left_in_row_;
    --left_;
  }

 private:
  const void* const* row_ = nullptr;
  const char* next_ = nullptr;
  int row_lines_;
  int left_in_row_ = 0;
  int left_;
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

// `lines` of `ahead`, one per step: all at once, they would wait for free line buffers, and the
// product with them, and hardware prefetchers would not follow.
template <class Product, Start kStart, bool kMaximum, int kRows, int kVectors>
ANYFLASH_INLINE void register_tile(const Operands& m, int row, PrefetchWalk& ahead, int lines,
                                   const Float* scale, Float* maxima) {
  Float sums[kRows][kVectors];
  float* c = m.c + row * m.c_row;
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Float{};
  }
  const Word* a = m.a + row * m.a_row;
  const Word* b = m.b;
  const auto add_step = [&]() __attribute__((always_inline)) {
    Words lanes[kVectors];
    for (int v = 0; v < kVectors; ++v) lanes[v] = load_words(b + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Words x = broadcast(a[r * m.a_row]);
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = Product::multiply_add(x, lanes[v], sums[r][v]);
      }
    }
    a += m.a_step;
    b += m.b_step;
  };
  int step = 0;
  for (; step < lines; ++step) {
    ahead.prefetch_line();
    add_step();
  }
  for (; step < m.steps; ++step) add_step();
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

// The last `rows` rows, fewer than a full tile.
template <class Product, Start kStart, bool kMaximum, int kRows, int kVectors>
ANYFLASH_INLINE void last_rows(const Operands& m, int rows, PrefetchWalk& ahead, const Float* scale,
                               Float* maxima) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      register_tile<Product, kStart, kMaximum, kRows, kVectors>(m, m.rows - kRows, ahead, 0, scale,
                                                                maxima);
    } else {
      last_rows<Product, kStart, kMaximum, kRows - 1, kVectors>(m, rows, ahead, scale, maxima);
    }
  }
}

// `scale` and `maxima` hold kVectors vectors, for Start::scaled and kMaximum alone; maxima: of each
// lane over the rows.
template <class Product, Start kStart, bool kMaximum, int kVectors>
static __attribute__((noinline)) void multiply_in_registers(const Operands& operands,
                                                            const float* scale, float* maxima) {
  constexpr int kRows = rows_in_registers(kVectors);
  const Operands m = operands;
  Float scales[kVectors], largest[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    if (kStart == Start::scaled) scales[v] = load(scale + v * kLanes);
    largest[v] = broadcast(-kInfinity);
  }
  const int tiles = m.rows / kRows;
  PrefetchWalk ahead(m.ahead);
  const int lines = tiles > 0 ? (ahead.left() + tiles - 1) / tiles : 0;
  // Hardware has nothing to follow in rows of a line or two: those come at once (measured).
  const int most_in_steps = m.ahead.row_lines > 2 ? m.steps : 0;
  int row = 0;
  for (int tile = 0; tile < tiles; ++tile, row += kRows) {
    const int some = lines < ahead.left() ? lines : ahead.left();
    const int in_steps = most_in_steps < some ? most_in_steps : some;
    for (int line = in_steps; line < some; ++line) ahead.prefetch_line();
    register_tile<Product, kStart, kMaximum, kRows, kVectors>(m, row, ahead, in_steps, scales,
                                                              largest);
  }
  last_rows<Product, kStart, kMaximum, kRows - 1, kVectors>(m, m.rows - row, ahead, scales,
                                                            largest);
  if (kMaximum) {
    for (int v = 0; v < kVectors; ++v) store(maxima + v * kLanes, largest[v]);
  }
}

// The same for any number of vectors of lanes up to kMaxVectors.
template <class Product, Start kStart, bool kMaximum, int kVectors = kMaxVectors>
ANYFLASH_INLINE void multiply_in_registers(int vectors, const Operands& m,
                                           const float* scale = nullptr, float* maxima = nullptr) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) {
      return multiply_in_registers<Product, kStart, kMaximum, kVectors - 1>(vectors, m, scale,
                                                                            maxima);
    }
  }
  multiply_in_registers<Product, kStart, kMaximum, kVectors>(m, scale, maxima);
}

}  // namespace anyflash::cpu::ANYFLASH_ISA
