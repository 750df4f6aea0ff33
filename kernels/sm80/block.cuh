// Which rows a block of an attention kernel has.
#pragma once

#include "kernels/common/sequence.cuh"
#include "kernels/sm80/arguments.h"

namespace anyflash::sm80 {

struct Block {
  Sequence sequence;
  int32_t first_head;  // of the group whose rows share tiles
  int32_t row_begin;   // row = token * group + head within the group
  int32_t split;       // which part of the keys

  __device__ __forceinline__ int32_t key_head(const Arguments& a) const {
    return first_head / (int32_t(a.attention.heads) / int32_t(a.attention.heads_k));
  }

  __device__ __forceinline__ bool has_rows(const Arguments& a) const {
    return row_begin < sequence.seqlen_q * int32_t(a.group.value);
  }

  // Whether the results are one part of several. Rows behind the last packed sequence have no keys
  // in any part, so the first is the whole.
  __device__ __forceinline__ bool in_parts(const Arguments& a) const {
    return a.splits > 1 && sequence.index < a.attention.batch;
  }

  // Grid: splits x tiles of kRows rows x groups x sequences, in one dimension, which has room for
  // 2^31 - 1 blocks, in the order of block_order.h.
  template <int32_t kRows>
  __device__ __forceinline__ static Block of(const Arguments& a) {
    const AttentionParams& p = a.attention;
    const int32_t group = int32_t(a.group.value), groups = int32_t(p.heads) / group;
    const int32_t block = int32_t(blockIdx.x) / a.splits;
    const int32_t split = int32_t(blockIdx.x) - block * a.splits;
    const BlockOrder::Place place = a.order.at(block);
    const int32_t first_head = place.pair % groups * group;
    if (!p.cu_seqlens_q) {
      return {sequence_of(p, place.pair / groups), first_head, place.row_tile * kRows, split};
    }
    const auto tile = PackedTile<kRows>::find(p.cu_seqlens_q, p.batch + 1, group, place.row_tile);
    Sequence s = tile.sequence < p.batch ? sequence_of(p, tile.sequence) : rest_of(p);
    if (tile.sequence == p.batch && split > 0) s.seqlen_q = 0;
    return {s, first_head, tile.row_tile * kRows, split};
  }
};

// Which keys a block of the backward has.
struct KeyBlock {
  Sequence sequence;
  int32_t head_k;
  int32_t key_begin;

  __device__ __forceinline__ bool has_keys() const { return key_begin < sequence.seqlen_k; }

  // Grid: tiles of kKeys keys x heads x sequences, first those that most rows see under a causal
  // mask.
  template <int32_t kKeys>
  __device__ __forceinline__ static KeyBlock of(const Arguments& a) {
    const AttentionParams& p = a.attention;
    const BlockOrder::Place place = a.order.at(int32_t(blockIdx.x));
    const int32_t tile = a.order.row_tiles - 1 - place.row_tile, heads_k = int32_t(p.heads_k);
    const int32_t head_k = place.pair % heads_k;
    if (!p.cu_seqlens_k) return {sequence_of(p, place.pair / heads_k), head_k, tile * kKeys};
    // With seqused_k only beginnings count: the first may lie anywhere, and the last sequence has
    // none behind it.
    const int64_t sequences = p.seqused_k ? p.batch : p.batch + 1;
    const int32_t skipped = PackedTile<kKeys>::first(p.cu_seqlens_k, 1, 0);
    const auto packed = PackedTile<kKeys>::find(p.cu_seqlens_k, sequences, 1, tile + skipped);
    const bool rest = packed.sequence == p.batch;
    return {rest ? rest_of_keys(p) : sequence_of(p, packed.sequence), head_k,
            packed.row_tile * kKeys};
  }
};

}  // namespace anyflash::sm80
