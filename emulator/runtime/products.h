// The arithmetic of the matrix instructions: exact products of 16-bit numbers, added one by one in
// fp32, k ascending.
#pragma once

#include "emulator/runtime/emulator.h"

namespace emu {

typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
constexpr int kWidth = 4;

template <Type16 kType>
inline float to_fp32(uint16_t x) {
  return kType == Type16::bf16 ? bf16_to_fp32(x) : fp16_to_fp32(x);
}

// The lower and the upper numbers of some registers.
template <Type16 kType>
inline void unpack(Words pairs, Floats& low, Floats& high) {
  if (kType == Type16::bf16) {
    low = (Floats)(pairs << 16);
    high = (Floats)(pairs & 0xFFFF0000);
    return;
  }
  const auto convert = [](Words x) {  // fp16_to_fp32
    const Floats magnitude = (Floats)((x & 0x7FFF) << 13) * 0x1p112f;
    const Words infinite_or_nan = (Words)((x & 0x7C00) == 0x7C00) & 0x7F800000;
    return (Floats)((Words)magnitude | infinite_or_nan | (x & 0x8000) << 16);
  };
  low = convert(pairs & 0xFFFF);
  high = convert(pairs >> 16);
}

// Two neighbours in k of eight columns.
struct PairRow {
  Floats even[2], odd[2];
};

// d[0 .. 8) += a b with k = 2 kPairs; a_even has the elements of a row with even k, a_odd the
// others.
template <int kPairs>
inline void add_products(float* d, const float* a_even, const float* a_odd, const PairRow* b) {
  Floats sum[2];
  std::memcpy(sum, d, sizeof sum);
  for (int i = 0; i < kPairs; ++i) {
    for (int j = 0; j < 2; ++j) {
      sum[j] += a_even[i] * b[i].even[j];
      sum[j] += a_odd[i] * b[i].odd[j];
    }
  }
  std::memcpy(d, sum, sizeof sum);
}

}  // namespace emu
