// What a call becomes: which kernel, its tiles of rows, and how many parts the keys are cut into.
// Host code that needs no CUDA: the caller asks for the workspace before it launches.
#pragma once

#include "kernels/masks.h"
#include "kernels/params.h"
#include "kernels/sm80/block_order.h"
#include "kernels/sm80/tile_shapes.h"

namespace anyflash::sm80 {

ANYFLASH_HOST_DEVICE constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// The decode kernel's tile: queries of all heads that share a key head.
constexpr int64_t kDecodeRows = 16;
constexpr int64_t kForwardRows = 128;

// A part has at least so many keys, a multiprocessor up to two blocks, the combination a limit.
constexpr int64_t kFewestSplitKeys = 256;
constexpr int64_t kBlocksPerMultiprocessor = 2;
constexpr int64_t kMostSplits = 128;

// What a family has for a head_dim.
struct Kernels {
  bool decode;
  int64_t forward_rows;  // of a tile
};

ANYFLASH_HOST_DEVICE constexpr Kernels kernels_of(int32_t least_sm, int32_t max_head_dim) {
  return least_sm >= 80 ? Kernels{true, kForwardRows}
                        : Kernels{false, tile_shape(max_head_dim, kSm75SharedKb).rows};
}

struct Plan {
  bool decodes;       // with the decode kernel
  int64_t group;      // heads of a key head whose rows share tiles
  int64_t row_tiles;  // of a sequence, or of all packed ones together
  int64_t pairs;      // of a sequence and group, or groups of a packed batch
  int64_t splits;     // parts of the keys
  int64_t rows;       // of all parts' results, counted with the longest sequence
  int64_t head_dim_v;

  ANYFLASH_HOST_DEVICE int64_t blocks() const { return row_tiles * pairs * splits; }

  // Per part: the rows' normalised results, then their log-sum-exps; fp32.
  ANYFLASH_HOST_DEVICE int64_t workspace_bytes() const {
    return splits > 1 ? splits * rows * (head_dim_v + 1) * 4 : 0;
  }
};

// Tiles of rows of a sequence, or of all packed ones together: of these the host knows only the sum
// of their lengths; sequence.cuh says which tile begins where. What follows the last sequence
// counts as one more.
ANYFLASH_HOST_DEVICE int64_t row_tiles_of(const AttentionParams& p, int64_t group, int64_t rows) {
  return p.cu_seqlens_q ? p.total_q * group / rows + p.batch + 1
                        : ceil_div(p.seqlen_q * group, rows);
}

// Keys that a row sees at most.
ANYFLASH_HOST_DEVICE int64_t longest_span(const AttentionParams& p) {
  if (p.window_left < 0 || p.window_right < 0 || p.window_left >= p.seqlen_k) return p.seqlen_k;
  return smaller(p.seqlen_k, p.window_left + smaller(p.window_right, p.seqlen_k) + p.seqlen_q);
}

ANYFLASH_HOST_DEVICE Plan plan_of(const AttentionParams& p, int32_t multiprocessors,
                                  const Kernels& kernels = {true, kForwardRows}) {
  Plan plan{false, 1, 0, 0, 1, p.batch * p.heads * p.seqlen_q, p.head_dim_v};
  if (p.heads_k <= 0) return plan;
  const int64_t group = p.heads / p.heads_k;
  plan.decodes = kernels.decode && p.dropout_p == 0 && !p.bias && p.seqlen_q * group <= kDecodeRows;
  const int64_t rows = plan.decodes ? kDecodeRows : kernels.forward_rows;
  // Dropout numbers, ALiBi slopes and a bias belong to a head, so their tiles have one.
  const bool may_share = p.dropout_p == 0 && !p.alibi_slopes && !p.bias;
  const int64_t apart = row_tiles_of(p, 1, rows) * group;
  if (plan.decodes || (may_share && row_tiles_of(p, group, rows) * 8 <= apart * 7)) {
    plan.group = group;
  }
  const int64_t heads = p.heads / plan.group;
  plan.row_tiles = row_tiles_of(p, plan.group, rows);
  plan.pairs = p.cu_seqlens_q ? heads : heads * p.batch;
  if (plan.blocks() == 0 || plan.rows == 0) return plan;
  const int64_t wanted = kBlocksPerMultiprocessor * multiprocessors / plan.blocks();
  const int64_t useful = smaller(ceil_div(longest_span(p), kFewestSplitKeys), kMostSplits);
  plan.splits = larger<int64_t>(1, smaller(wanted, useful));
  return plan;
}

// Of a GPU that holds `slots` blocks at a time.
ANYFLASH_HOST_DEVICE BlockOrder order_of(const AttentionParams& p, const Plan& plan, int64_t slots,
                                         int64_t l2_bytes) {
  const int64_t key_bytes = 2 * (p.head_dim + p.head_dim_v) * larger<int64_t>(p.seqlen_k, 1);
  const int64_t sharing = p.heads / p.heads_k / plan.group;  // pairs that read the same keys
  return BlockOrder::of(plan.row_tiles, plan.pairs, slots, l2_bytes / 2 / key_bytes * sharing);
}

}  // namespace anyflash::sm80
