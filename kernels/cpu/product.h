// The one matrix product of all CPU kernels: C (rows x lanes) = [C *] + A B.
#pragma once

#include "kernels/cpu/product_tiles.h"

namespace anyflash::cpu::ANYFLASH_ISA {

// `scale` and `maxima` hold a vector for each of `vectors`, which are up to kMaxVectors; for
// Start::scaled and kMaximum alone. maxima: of each lane over the rows.
template <class Product, Start kStart, bool kMaximum>
ANYFLASH_INLINE void multiply(int vectors, const Operands& m, const float* scale = nullptr,
                              float* maxima = nullptr) {
#if defined(ANYFLASH_TILES)
  if constexpr (Product::kTiles) {
    return multiply_in_tiles<Product, kStart, kMaximum>(vectors, m, scale, maxima);
  }
#endif
  multiply_in_registers<Product, kStart, kMaximum>(vectors, m, scale, maxima);
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
