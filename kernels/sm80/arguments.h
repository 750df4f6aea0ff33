// What the kernels get: the call, and what the host works out once for all blocks.
#pragma once

#include "kernels/common/divisor.h"
#include "kernels/common/scores.cuh"

namespace anyflash::sm80 {

struct ForwardArguments {
  AttentionParams attention;
  ScoreArguments score;
  Divisor page_size;
  int32_t row_tiles;  // of the longest sequence
};

struct DecodeArguments {
  AttentionParams attention;
  ScoreArguments score;
  Divisor page_size;
  Divisor group;  // query heads per key head
  int32_t row_tiles;
  int32_t splits;
  float* part_out;  // (splits, batch, heads, seqlen_q, head_dim_v); with several splits
  float* part_lse;  // (splits, batch, heads, seqlen_q)
};

}  // namespace anyflash::sm80
