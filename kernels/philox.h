// The dropout bits of every back end: Philox-4x32 counters, one 16-bit number per attention
// probability.
#pragma once

#include "kernels/portable.h"

namespace anyflash {

struct PhiloxWords {
  uint32_t w[4];
};

// All 64 bits of a product. Of the plain expression NVIDIA's compiler makes an addition of zero
// more.
ANYFLASH_HOST_DEVICE uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
}

// Philox-4x32 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011). Ours has 7
// rounds, the published vectors 10.
template <int kRounds>
ANYFLASH_HOST_DEVICE PhiloxWords philox_4x32(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = wide_product(0xD2511F53u, counter.w[0]);
    const uint64_t product1 = wide_product(0xCD9E8D57u, counter.w[2]);
    counter = {{uint32_t(product1 >> 32) ^ counter.w[1] ^ key0, uint32_t(product1),
                uint32_t(product0 >> 32) ^ counter.w[3] ^ key1, uint32_t(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// Decides for row i, column j of sequence-and-head `bh` = sequence * heads + head whether a
// probability is kept. Rows and columns count from the sequence's first query and first visible key
// (after leftpad_k).
//
// One Philox call serves rows {i, i + 8} x columns {j, j + 1, j + 8, j + 9} of a 16 x 16 tile: what
// one thread holds of an mma.m16n8 pair of fragments, so a kernel draws no bit twice.
struct Dropout {
  uint64_t seed;
  uint32_t offset;     // low half of rng_state[1]
  uint32_t threshold;  // kept if the 16-bit number is not below it

  // rng_state: (seed, offset).
  static ANYFLASH_HOST_DEVICE Dropout of(const int64_t* rng_state, double dropout_p) {
    return {uint64_t(rng_state[0]), uint32_t(rng_state[1]), threshold_for(dropout_p)};
  }

  // floor(p * 65536 + 1/2), at most 65535. dropout_p in [0, 1).
  static ANYFLASH_HOST_DEVICE uint32_t threshold_for(double dropout_p) {
    const uint32_t rounded = uint32_t(dropout_p * 65536.0 + 0.5);
    return rounded < 65535u ? rounded : 65535u;
  }

  // The words of the counter for a row and a column. 16 further on they are 8 and 4 larger.
  static ANYFLASH_HOST_DEVICE uint32_t row_word(uint32_t row) { return row / 16 * 8 + row % 8; }
  static ANYFLASH_HOST_DEVICE uint32_t col_word(uint32_t col) { return col / 16 * 4 + col % 8 / 2; }

  ANYFLASH_HOST_DEVICE PhiloxWords draw(uint32_t bh, uint32_t row_word, uint32_t col_word) const {
    return philox_4x32<7>({{col_word, row_word, bh, offset}}, uint32_t(seed), uint32_t(seed >> 32));
  }

  ANYFLASH_HOST_DEVICE PhiloxWords words(uint32_t bh, uint32_t row, uint32_t col) const {
    return draw(bh, row_word(row), col_word(col));
  }

  // The half of words(bh, row, col) that belongs to this element, as the upper half of a word: what
  // stands below it decides nothing.
  static ANYFLASH_HOST_DEVICE uint32_t upper16(const PhiloxWords& words, uint32_t row,
                                               uint32_t col) {
    const uint32_t half = row % 16 / 8 * 4 + col % 16 / 8 * 2 + col % 2;
    return half % 2 == 0 ? words.w[half / 2] << 16 : words.w[half / 2];
  }

  ANYFLASH_HOST_DEVICE bool keeps(const PhiloxWords& words, uint32_t row, uint32_t col) const {
    return upper16(words, row, col) >= threshold << 16;
  }

  ANYFLASH_HOST_DEVICE bool keeps(uint32_t bh, uint32_t row, uint32_t col) const {
    return keeps(words(bh, row, col), row, col);
  }
};

}  // namespace anyflash
