// What a backward becomes: its tiles, and the memory it needs for a while. Host code that needs no
// CUDA.
#pragma once

#include "kernels/sm80/plan.h"

namespace anyflash::sm80 {

// Of one query row; prepare_kernel writes them.
struct alignas(8) RowNumbers {
  float lse;  // in powers of two, counted from ScoreArguments::origin; +inf: no probabilities
  float delta;
};

// Numbers of query rows lie in tiles of so many, whatever the tiles of a kernel are: a sequence
// begins with a tile of its own.
constexpr int32_t kRowTile = 128;

struct BackwardPlan {
  int64_t row_tiles;  // of kRowTile query rows, of a pair
  int64_t pairs;      // of a sequence and head, or heads of a packed batch
  int64_t head_dim;   // of dq's sums, 0 without
  bool bias;
  bool sinks;

  ANYFLASH_HOST_DEVICE int64_t rows() const { return pairs * row_tiles * kRowTile; }
  ANYFLASH_HOST_DEVICE int64_t rows_bytes() const { return rows() * int64_t{sizeof(RowNumbers)}; }
  ANYFLASH_HOST_DEVICE int64_t references_bytes() const { return bias ? rows() * 4 : 0; }
  ANYFLASH_HOST_DEVICE int64_t sums_bytes() const { return rows() * head_dim * 4; }
  ANYFLASH_HOST_DEVICE int64_t workspace_bytes() const {
    return rows_bytes() + references_bytes() + sums_bytes() + (sinks ? pairs * row_tiles * 4 : 0);
  }
};

// Of a family: that of sm_75 never adds to dq.
ANYFLASH_HOST_DEVICE BackwardPlan backward_plan_of(const AttentionParams& p, int32_t least_sm,
                                                   int32_t max_head_dim) {
  return {row_tiles_of(p, 1, kRowTile), p.cu_seqlens_q ? p.heads : p.heads * p.batch,
          p.deterministic || least_sm < 80 ? 0 : max_head_dim, p.bias != nullptr,
          p.dsinks != nullptr};
}

// Tiles of keys of a sequence, or of all packed ones and what follows them.
ANYFLASH_HOST_DEVICE int64_t key_tiles_of(const AttentionParams& p, int64_t keys) {
  if (!p.cu_seqlens_k) return ceil_div(p.seqlen_k, keys);
  // With seqused_k nothing says where the last sequence ends, and without one there are no keys.
  return p.seqused_k && p.batch == 0 ? 0 : p.total_k / keys + p.batch + 1;
}

}  // namespace anyflash::sm80
