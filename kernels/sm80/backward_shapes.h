// Which tiles the backward takes for a head_dim on a device: backward_tiles.def.
#pragma once

#include "kernels/sm80/tile_shapes.h"

namespace anyflash::sm80 {

struct KeyTileShape {
  int32_t max_head_dim;
  int32_t shared_kb;  // of a multiprocessor, at least
  int32_t rows;
  int32_t keys;
  int32_t score_warps;
  int32_t key_warps;
  int32_t query_warps;
  int32_t q_buffers;
  bool v_in_registers;
};

struct QueryTileShape {
  int32_t max_head_dim;
  int32_t shared_kb;
  int32_t rows;
  int32_t keys;
  int32_t warps;
  bool q_in_registers;
};

constexpr KeyTileShape kKeyTileShapes[] = {
#define KEY_TILE(...) {__VA_ARGS__},
#define QUERY_TILE(...)
#include "kernels/sm80/backward_tiles.def"
#undef QUERY_TILE
#undef KEY_TILE
};

constexpr QueryTileShape kQueryTileShapes[] = {
#define KEY_TILE(...)
#define QUERY_TILE(...) {__VA_ARGS__},
#include "kernels/sm80/backward_tiles.def"
#undef QUERY_TILE
#undef KEY_TILE
};

ANYFLASH_HOST_DEVICE constexpr KeyTileShape key_tile_shape(int32_t max_head_dim,
                                                           int32_t shared_kb) {
  return find_shape(kKeyTileShapes, max_head_dim, shared_kb);
}
ANYFLASH_HOST_DEVICE constexpr QueryTileShape query_tile_shape(int32_t max_head_dim,
                                                               int32_t shared_kb) {
  return find_shape(kQueryTileShapes, max_head_dim, shared_kb);
}

}  // namespace anyflash::sm80
