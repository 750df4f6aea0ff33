#include "core/kvcache.h"

#include "core/run.h"

namespace anyflash {
namespace {

// (batch) as (batch, 1).
TensorView as_column(TensorView x) {
  x.rank = 2;
  x.sizes[1] = 1;
  x.strides[1] = 1;
  return x;
}

TensorView first_rows(TensorView x, int64_t rows) {
  x.sizes[0] = rows;
  return x;
}

// The pages that new rows go to. A cache without pages has one per row of the cache, and
// cache_batch_idx says whose it is.
void set_pages(const KVCacheCall& call, KvcacheAppendParams& params) {
  params.cache_seqlens = data_of<int32_t>(call.cache_seqlens);
  params.num_pages = call.k_cache.size(0);
  params.page_size = call.k_cache.size(1);
  params.pages_per_sequence = 1;
  if (call.block_table.given()) {
    params.block_table = data_of<int32_t>(call.block_table);
    params.block_table_stride = call.block_table.stride(0);
    params.pages_per_sequence = call.block_table.size(1);
  } else if (call.cache_batch_idx.given()) {
    params.block_table = data_of<int32_t>(call.cache_batch_idx);
    params.block_table_stride = 1;
  }
}

void set_rotary(const KVCacheCall& call, const AttentionOptions& options,
                const TensorView& q_rotated, KvcacheAppendParams& params) {
  params.rotary_cos = call.rotary_cos.data;
  params.rotary_sin = call.rotary_sin.data;
  params.rotary_cos_stride = call.rotary_cos.stride(0);
  params.rotary_sin_stride = call.rotary_sin.stride(0);
  params.seqlen_rotary = call.rotary_cos.size(0);
  params.rotary_dim = 2 * call.rotary_cos.size(1);
  params.interleaved = call.rotary_interleaved;
  params.q = rows_of(call.q);
  params.q_rotated = rows_of(q_rotated);
  params.seqlen_q = call.q.size(1);
  params.heads = call.q.size(2);
  params.q_positions_move = options.window_left >= 0 || options.window_right >= 0;
}

}  // namespace

AttentionCall attention_over(const KVCacheCall& call) {
  AttentionCall attention;
  attention.q = call.q;
  attention.k = call.k_cache;
  attention.v = call.v_cache;
  attention.seqused_k = call.cache_seqlens;
  attention.leftpad_k = call.cache_leftpad;
  attention.alibi_slopes = call.alibi_slopes;
  attention.sinks = call.sinks;
  attention.options = call.options;
  if (call.block_table.given()) {
    attention.block_table = call.block_table;
  } else if (call.cache_batch_idx.given()) {
    attention.block_table = as_column(call.cache_batch_idx);
  } else if (call.k_cache.size(0) > call.batch()) {
    attention.k = first_rows(call.k_cache, call.batch());
    attention.v = first_rows(call.v_cache, call.batch());
  }
  return attention;
}

void run_append(const Instance& instance, const KVCacheCall& call, const AttentionOptions& options,
                const AppendResults& results, void* where) {
  KvcacheAppendParams params{};
  params.k = rows_of(call.k);
  params.v = rows_of(call.v);
  params.k_cache = rows_of(call.k_cache);
  params.v_cache = rows_of(call.v_cache);
  set_pages(call, params);
  params.batch = call.batch();
  params.seqlen_new = call.seqlen_new();
  params.heads_k = call.k.size(2);
  params.head_dim = call.k.size(3);
  params.head_dim_v = call.v.size(3);
  params.seqused_k = static_cast<int32_t*>(results.seqused_k.data);
  if (results.q_rotated.given()) set_rotary(call, options, results.q_rotated, params);
  launch(instance, &params, where);
}

}  // namespace anyflash
