// What the kernels of the backward get, beside what those of the forward do.
#pragma once

#include "kernels/sm80/arguments.h"
#include "kernels/sm80/backward_plan.h"

namespace anyflash::sm80 {

struct BackwardArguments : Arguments {
  int64_t q_tile_bytes;  // how far keys_kernel's next tile is
  int64_t dout_tile_bytes;
  int64_t padded_rows;  // of a pair: its row tiles times kRowTile
  RowNumbers* rows;     // (pairs, padded_rows)
  float* references;    // the same, see backward_far_rows.cuh; with a bias
  float* dq_sums;       // (pairs, padded_rows, max_head_dim), in the order of QuerySums; or null
  float* dsinks_parts;  // (pairs, row tiles), or null
};

}  // namespace anyflash::sm80
