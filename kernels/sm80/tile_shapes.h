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

ANYFLASH_HOST_DEVICE constexpr TileShape tile_shape(int32_t max_head_dim, int32_t shared_kb) {
  TileShape found{};
  for (const TileShape& shape : kTileShapes) {
    const bool fits = shape.max_head_dim == max_head_dim && shape.shared_kb <= shared_kb;
    if (fits && shape.shared_kb > found.shared_kb) found = shape;
  }
  return found;
}

}  // namespace anyflash::sm80
