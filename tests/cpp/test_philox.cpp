#include "catch.h"
#include "kernels/philox.h"

using anyflash::Dropout;
using anyflash::philox_4x32;
using anyflash::PhiloxWords;

namespace {

bool same(const PhiloxWords& a, const PhiloxWords& b) {
  return a.w[0] == b.w[0] && a.w[1] == b.w[1] && a.w[2] == b.w[2] && a.w[3] == b.w[3];
}

// The contract's formulas, written once more without the header's arrangement.
uint32_t element_bits(int64_t seed, int64_t offset, uint32_t bh, uint32_t i, uint32_t j) {
  const PhiloxWords counter{{(j / 16) * 4 + (j % 8) / 2, (i / 16) * 8 + i % 8, bh,
                             uint32_t(uint64_t(offset) & 0xFFFFFFFFu)}};
  const PhiloxWords words = philox_4x32<7>(counter, uint32_t(uint64_t(seed) & 0xFFFFFFFFu),
                                           uint32_t(uint64_t(seed) >> 32));
  uint32_t halves[8];
  for (int n = 0; n < 4; ++n) {
    halves[2 * n] = words.w[n] & 0xFFFFu;
    halves[2 * n + 1] = words.w[n] >> 16;
  }
  return halves[(i % 16) / 8 * 4 + (j % 16) / 8 * 2 + j % 2];
}

}  // namespace

TEST_CASE("philox: published vectors of Philox-4x32-10", "[philox]") {
  CHECK(same(philox_4x32<10>({{0, 0, 0, 0}}, 0, 0),
             {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}));
  const uint32_t ones = 0xFFFFFFFFu;
  CHECK(same(philox_4x32<10>({{ones, ones, ones, ones}}, ones, ones),
             {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}));
  CHECK(same(
      philox_4x32<10>({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0xa4093822, 0x299f31d0),
      {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}));
}

TEST_CASE("philox: vectors of our 7 rounds", "[philox]") {
  CHECK(same(philox_4x32<7>({{0, 0, 0, 0}}, 0, 0),
             {{0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}}));
  CHECK(same(philox_4x32<7>({{1, 2, 3, 4}}, 5, 6),
             {{0xcceb838b, 0x94b8d4ab, 0x3b19758c, 0x0e1a9304}}));
}

TEST_CASE("philox: dropout bits of an element", "[philox]") {
  const int64_t seeds[] = {0, 42, -1, 0x123456789ABCDEF};
  int wrong = 0;
  for (const int64_t seed : seeds) {
    const Dropout dropout{uint64_t(seed), uint32_t(int64_t{7} << 33 | 9), 0};
    for (uint32_t i = 0; i < 50; ++i) {
      for (uint32_t j = 0; j < 50; ++j) {
        wrong += Dropout::upper16(dropout.words(3, i, j), i, j) >> 16 !=
                 element_bits(seed, int64_t{7} << 33 | 9, 3, i, j);
      }
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("philox: one call serves the eight elements of an mma fragment pair", "[philox]") {
  const Dropout dropout{42, 7, 0};
  for (const uint32_t row : {0u, 5u, 16u, 39u}) {
    for (const uint32_t col : {0u, 2u, 22u, 38u}) {
      const PhiloxWords words = dropout.words(1, row, col);
      for (const uint32_t i : {row, row / 16 * 16 + (row + 8) % 16}) {
        for (const uint32_t j : {col, col + 1, col + 8, col + 9}) {
          if (j / 16 == col / 16) CHECK(same(words, dropout.words(1, i, j)));
        }
      }
    }
  }
}

TEST_CASE("philox: the elements of a fragment pair use each of its eight numbers once",
          "[philox]") {
  const PhiloxWords numbered{{0x00010000, 0x00030002, 0x00050004, 0x00070006}};  // half n holds n
  for (uint32_t row = 0; row < 8; ++row) {
    for (uint32_t col = 0; col < 8; col += 2) {
      uint32_t used = 0;
      for (const uint32_t i : {row, row + 8}) {
        for (const uint32_t j : {col, col + 1, col + 8, col + 9})
          used |= 1u << (Dropout::upper16(numbered, i, j) >> 16);
      }
      CHECK(used == 0xFF);
    }
  }
}

TEST_CASE("philox: thresholds", "[philox]") {
  CHECK(Dropout::threshold_for(0.0) == 0);
  CHECK(Dropout::threshold_for(0.5) == 32768);
  CHECK(Dropout::threshold_for(0.1) == 6554);
  CHECK(Dropout::threshold_for(0.999999) == 65535);
}

TEST_CASE("philox: dropout keeps the share it should", "[philox]") {
  for (const double p : {0.1, 0.5, 0.83}) {
    const Dropout dropout{2024, 1, Dropout::threshold_for(p)};
    int kept = 0;
    for (uint32_t i = 0; i < 300; ++i) {
      for (uint32_t j = 0; j < 300; ++j) kept += dropout.keeps(5, i, j);
    }
    CHECK(kept / 90000.0 == Approx(1 - p).margin(0.01));
  }
}
