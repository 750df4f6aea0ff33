// How much of the bias gradient's first stage goes into the workspace; needs no CUDA.
#pragma once

#include "kernels/params.h"

namespace anyflash::bias_activation {

ANYFLASH_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of the workspace. Enough blocks to fill any GPU, few enough that the second stage costs
// little; depends on the shape alone, so that sums come out the same everywhere.
ANYFLASH_HOST_DEVICE constexpr int64_t num_partials(int64_t rows, int64_t cols) {
  constexpr int64_t kBlocks = 2048, kMostPartials = 256, kTileRows = 16, kTileCols = 256;
  const int64_t per_column_tile = kBlocks / (cols < kTileCols ? 1 : ceil_div(cols, kTileCols));
  const int64_t wanted = per_column_tile < 1               ? 1
                         : per_column_tile < kMostPartials ? per_column_tile
                                                           : kMostPartials;
  const int64_t row_tiles = ceil_div(rows, kTileRows);
  return row_tiles < wanted ? row_tiles : wanted;
}

}  // namespace anyflash::bias_activation
