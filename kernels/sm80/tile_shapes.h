// Which tile the forward takes for a head_dim on a device: tiles.def.
#pragma once

#include "kernels/portable.h"

namespace anyflash::sm80 {

struct TileShape {
  int32_t max_head_dim;
  int32_t shared_kb;  // of a multiprocessor, at least
  int32_t rows;
  int32_t keys;
  int32_t warps;  // share the rows
};

constexpr TileShape kTileShapes[] = {
#define TILE(max_head_dim, shared_kb, rows, keys, warps) \
  {max_head_dim, shared_kb, rows, keys, warps},
#include "kernels/sm80/tiles.def"
#undef TILE
};

// What every GPU from sm_80 on has, and what sm_75 has.
constexpr int32_t kLeastSharedKb = 100;
constexpr int32_t kSm75SharedKb = 64;

// The one for the most shared memory that is there.
template <typename Shape, int32_t kCount>
ANYFLASH_HOST_DEVICE constexpr Shape find_shape(const Shape (&shapes)[kCount], int32_t max_head_dim,
                                                int32_t shared_kb) {
  Shape found{};
  for (const Shape& shape : shapes) {
    const bool fits = shape.max_head_dim == max_head_dim && shape.shared_kb <= shared_kb;
    if (fits && shape.shared_kb > found.shared_kb) found = shape;
  }
  return found;
}

ANYFLASH_HOST_DEVICE constexpr TileShape tile_shape(int32_t max_head_dim, int32_t shared_kb) {
  return find_shape(kTileShapes, max_head_dim, shared_kb);
}

// Whether a GPU that runs this code takes tiles for so much shared memory (the CUDA C++ Programming
// Guide's table of compute capabilities). What none takes has no code.
template <typename Shape>
ANYFLASH_HOST_DEVICE constexpr bool runs_here([[maybe_unused]] Shape (*shape)(int32_t, int32_t),
                                              [[maybe_unused]] int32_t max_head_dim,
                                              [[maybe_unused]] int32_t shared_kb) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ > 800
  constexpr int32_t kKb = __CUDA_ARCH__ == 870                                ? 164
                          : __CUDA_ARCH__ / 100 == 8 || __CUDA_ARCH__ >= 1200 ? 100
                                                                              : 228;
  return shape(max_head_dim, kKb).shared_kb == shared_kb;
#else
  return true;
#endif
}

}  // namespace anyflash::sm80
