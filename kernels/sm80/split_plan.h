// Which calls the decode kernel takes, and into how many parts it cuts their keys. Host code that
// needs no CUDA: the caller asks for the workspace before it launches.
#pragma once

#include "kernels/masks.h"
#include "kernels/params.h"

namespace anyflash::sm80 {

ANYFLASH_HOST_DEVICE constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// The heads that share a key head and their queries are rows of one tile.
constexpr int64_t kDecodeRows = 16;

// With more rows than this per key head, a tile of the forward kernel is better used.
constexpr int64_t kMostDecodeRows = 4 * kDecodeRows;

// A part has at least so many keys, a multiprocessor up to two blocks, the combination a limit.
constexpr int64_t kFewestSplitKeys = 256;
constexpr int64_t kBlocksPerMultiprocessor = 2;
constexpr int64_t kMostSplits = 128;

struct SplitPlan {
  int64_t row_tiles;
  int64_t splits;
  int64_t rows;  // of all sequences and heads, counted with the longest sequence
  int64_t head_dim_v;

  // Per part: the rows' normalised results, then their log-sum-exps; fp32.
  ANYFLASH_HOST_DEVICE int64_t workspace_bytes() const {
    return splits > 1 ? splits * rows * (head_dim_v + 1) * 4 : 0;
  }
};

ANYFLASH_HOST_DEVICE bool decodes(const AttentionParams& p) {
  return p.dropout_p == 0 && p.seqlen_q * (p.heads / p.heads_k) <= kMostDecodeRows;
}

ANYFLASH_HOST_DEVICE SplitPlan plan_splits(const AttentionParams& p, int32_t multiprocessors) {
  if (p.heads_k <= 0 || !decodes(p)) return {0, 1, 0, 0};
  SplitPlan plan{ceil_div(p.seqlen_q * (p.heads / p.heads_k), kDecodeRows), 1,
                 p.batch * p.heads * p.seqlen_q, p.head_dim_v};
  int64_t keys = p.seqlen_k;
  if (p.window_left >= 0 && p.window_right >= 0 && p.window_left < keys) {
    keys = smaller(keys, p.window_left + smaller(p.window_right, keys) + p.seqlen_q);
  }
  const int64_t blocks = p.batch * p.heads_k * plan.row_tiles;
  if (blocks == 0) return plan;
  const int64_t wanted = kBlocksPerMultiprocessor * multiprocessors / blocks;
  const int64_t useful = smaller(ceil_div(keys, kFewestSplitKeys), kMostSplits);
  plan.splits = larger<int64_t>(1, smaller(wanted, useful));
  return plan;
}

}  // namespace anyflash::sm80
