// What the kernels get: the call, and what the host works out once for all blocks.
#pragma once

#include "kernels/common/divisor.h"
#include "kernels/common/scores.cuh"
#include "kernels/params.h"
#include "kernels/sm80/block_order.h"

namespace anyflash::sm80 {

// Of a row and a part of its keys: the largest score, and the sum of weights beside it. Apart,
// because far from 0 a log-sum-exp does not hold both.
struct alignas(8) PartSum {
  float max;
  float sum;
};

struct Arguments {
  AttentionParams attention;
  ScoreArguments score;
  Divisor page_size;
  Divisor group;  // heads of a key head whose rows share tiles: row = token * group + head
  BlockOrder order;
  int64_t k_tile_bytes;  // how far a kernel's next tile is
  int64_t v_tile_bytes;
  int32_t splits;
  float* part_out;     // (splits, batch, heads, seqlen_q, head_dim_v); with several splits
  PartSum* part_sums;  // (splits, batch, heads, seqlen_q)
};

}  // namespace anyflash::sm80
