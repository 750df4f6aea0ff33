// Attention over a key/value cache: what _flash_attn_kvcache_ was called with.
#pragma once

#include "attention.h"
#include "kernels/launch.h"

namespace anyflash {

// Paged caches: (num_blocks, page_size, heads_k, head_dim), one row of block_table per sequence.
struct KVCacheCall {
  Tensor q;                          // (batch, seqlen_q, heads, head_dim)
  Tensor k_cache;                    // (batch_cache, capacity, heads_k, head_dim)
  Tensor v_cache;                    // k_cache's shape with head_dim_v
  OptionalTensor k{};                // (batch, seqlen_new, heads_k, head_dim)
  OptionalTensor v{};                // k's shape with head_dim_v
  OptionalTensor rotary_cos{};       // (seqlen_rotary, rotary_dim / 2), q's dtype
  OptionalTensor rotary_sin{};       // like rotary_cos
  OptionalTensor cache_seqlens{};    // (batch) int32: keys in the cache before the call
  OptionalTensor cache_batch_idx{};  // (batch) int32: which row of the cache is whose
  OptionalTensor cache_leftpad{};    // (batch) int32
  OptionalTensor block_table{};      // (batch, max_blocks) int32
  OptionalTensor alibi_slopes{};
  OptionalTensor sinks{};
  double softmax_scale = 1.0;
  double softcap = 0.0;
  bool rotary_interleaved = true;

  int64_t batch() const { return q.size(0); }
  int64_t seqlen_new() const { return k ? k->size(1) : 0; }
  int64_t capacity() const {
    return block_table ? block_table->size(1) * k_cache.size(1) : k_cache.size(1);
  }
};

void validate_kvcache(const KVCacheCall& call);

// x (batch, seqlen, heads, head_dim) turned by the angles of its positions `where` (batch, seqlen)
// int64; fp32 arithmetic, x's dtype.
Tensor rotate(const Tensor& x, const Tensor& rotary_cos, const Tensor& rotary_sin,
              const Tensor& where, bool interleaved);

// Writes k and v (batch, seqlen_new, ...) to the rows `rows` (batch, seqlen_new) int64 of the
// caches. No host synchronisation.
void append(const KVCacheCall& call, const Tensor& k, const Tensor& v, const Tensor& rows);

namespace kernel {
struct Appended {
  Tensor q;          // turned where the call has rotary tables
  Tensor seqused_k;  // (batch) int32: keys in the cache after the call
};

// Appends call.k and call.v in one launch. Rows of q turn by their own positions, or all by the
// first new one.
Appended append(const Instance& instance, const KVCacheCall& call, bool q_positions_move);
}  // namespace kernel

}  // namespace anyflash
