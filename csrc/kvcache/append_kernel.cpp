#include "attention_params.h"
#include "kvcache.h"
#include "launch.h"
#include "layout.h"
#include "stable/aten.h"

namespace anyflash::kernel {
namespace {

const int32_t* ints_of(const Tensor& x) { return static_cast<const int32_t*>(x.const_data_ptr()); }

// The pages that new rows go to. A cache without pages has one per row of the cache, and
// cache_batch_idx says whose it is.
void set_pages(const KVCacheCall& call, KvcacheAppendParams& p) {
  p.cache_seqlens = ints_of(*call.cache_seqlens);
  p.num_pages = call.k_cache.size(0);
  p.page_size = call.k_cache.size(1);
  p.pages_per_sequence = 1;
  if (call.block_table) {
    p.block_table = ints_of(*call.block_table);
    p.block_table_stride = call.block_table->stride(0);
    p.pages_per_sequence = call.block_table->size(1);
  } else if (call.cache_batch_idx) {
    p.block_table = ints_of(*call.cache_batch_idx);
    p.block_table_stride = 1;
  }
}

}  // namespace

Appended append(const Instance& instance, const KVCacheCall& call, bool q_positions_move) {
  const Tensor k = contiguous_last_dim(*call.k), v = contiguous_last_dim(*call.v);
  const Tensor q = contiguous_last_dim(call.q);
  KvcacheAppendParams params{};
  params.k = rows_of(k);
  params.v = rows_of(v);
  params.k_cache = rows_of(call.k_cache);
  params.v_cache = rows_of(call.v_cache);
  set_pages(call, params);
  params.batch = call.batch();
  params.seqlen_new = call.seqlen_new();
  params.heads_k = k.size(2);
  params.head_dim = k.size(3);
  params.head_dim_v = v.size(3);
  const bool rotates = call.rotary_cos && call.rotary_cos->size(1) > 0;
  const Tensor seqused_k = empty({params.batch}, q, ScalarType::Int);
  params.seqused_k = static_cast<int32_t*>(seqused_k.data_ptr());
  if (!rotates) {
    launch(instance, &params, q);
    return {call.q, seqused_k};
  }
  const Tensor cos = contiguous_last_dim(*call.rotary_cos);
  const Tensor sin = contiguous_last_dim(*call.rotary_sin);
  const Tensor q_rotated = empty(q.sizes(), q, q.scalar_type());
  params.rotary_cos = cos.const_data_ptr();
  params.rotary_sin = sin.const_data_ptr();
  params.rotary_cos_stride = cos.stride(0);
  params.rotary_sin_stride = sin.stride(0);
  params.seqlen_rotary = cos.size(0);
  params.rotary_dim = 2 * cos.size(1);
  params.interleaved = call.rotary_interleaved;
  params.q = rows_of(q);
  params.q_rotated = rows_of(q_rotated);
  params.seqlen_q = q.size(1);
  params.heads = q.size(2);
  params.q_positions_move = q_positions_move;
  launch(instance, &params, q);
  return {q_rotated, seqused_k};
}

}  // namespace anyflash::kernel
