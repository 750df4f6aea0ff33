// A call with a key/value cache as data: append, then attend. Shapes: csrc/schemas.def.
#pragma once

#include "core/attention.h"

namespace anyflash {

// Paged caches: (num_blocks, page_size, heads_k, head_dim), one row of block_table per sequence.
struct KVCacheCall {
  TensorView q;                // (batch, seqlen_q, heads, head_dim)
  TensorView k_cache;          // (batch_cache, capacity, heads_k, head_dim)
  TensorView v_cache;          // k_cache's shape with head_dim_v
  TensorView k;                // (batch, seqlen_new, heads_k, head_dim)
  TensorView v;                // k's shape with head_dim_v
  TensorView rotary_cos;       // (seqlen_rotary, rotary_dim / 2), q's dtype
  TensorView rotary_sin;       // like rotary_cos
  TensorView cache_seqlens;    // (batch) int32: keys in the cache before the call
  TensorView cache_batch_idx;  // (batch) int32: which row of the cache is whose
  TensorView cache_leftpad;    // (batch) int32
  TensorView block_table;      // (batch, max_blocks) int32
  TensorView alibi_slopes;
  TensorView sinks;
  AttentionOptions options;
  bool rotary_interleaved = true;

  int64_t batch() const { return q.size(0); }
  int64_t seqlen_new() const { return k.given() ? k.size(1) : 0; }
  int64_t capacity() const {
    return block_table.given() ? block_table.size(1) * k_cache.size(1) : k_cache.size(1);
  }
  bool appends() const { return seqlen_new() > 0 && batch() > 0; }
};

void check_kvcache(const KVCacheCall& call);

// The caches as attention sees them. A cache whose rows are picked by cache_batch_idx is a paged
// one with one page per sequence.
AttentionCall attention_over(const KVCacheCall& call);

Problem describe_append(const KVCacheCall& call, const Caller& caller);

// What an append writes beside the caches.
struct AppendResults {
  TensorView q_rotated;  // q's shape; given where the call has rotary tables
  TensorView seqused_k;  // (batch) int32: keys in the cache after the call
};

// Appends call.k and call.v in one launch. Rows of q turn by their own positions under a mask that
// moves with them (`options` after normalise()), else all by the first new one.
void run_append(const Instance& instance, const KVCacheCall& call, const AttentionOptions& options,
                const AppendResults& results, void* where);

}  // namespace anyflash
