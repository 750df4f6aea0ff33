// Attention over a key/value cache: prepare, append, attend.
#include "kvcache/kvcache.h"

#include "attention/run.h"
#include "operators.h"
#include "stable/aten.h"
#include "stable/contiguous_rows.h"
#include "stable/grad_mode.h"
#include "stable/launch_on.h"
#include "stable/view.h"

namespace anyflash {
namespace {

using MaybeTensors = std::vector<OptionalTensor>;

// first (batch) int32 plus begin, begin + 1, ... end - 1: (batch, end - begin) int64. On the CPU
// the numbers are at hand, on a GPU they stay there.
Tensor positions(const Tensor& first, int64_t begin, int64_t end) {
  const int64_t batch = first.size(0), length = end - begin;
  if (!first.is_cpu()) {
    const Tensor steps = narrow(arange(end, first), 0, begin, length);
    return add(unsqueeze(to_dtype(first, ScalarType::Long), 1), unsqueeze(steps, 0));
  }
  const auto* starts = static_cast<const int32_t*>(first.const_data_ptr());
  Tensor result = empty({batch, length}, first, ScalarType::Long);
  auto* position = static_cast<int64_t*>(result.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = begin; i < end; ++i) *position++ = starts[b] + i;
  }
  return result;
}

// lengths (batch) int32, each plus `added`.
Tensor longer(const Tensor& lengths, int64_t added) {
  return to_dtype(select(positions(lengths, added, added + 1), 1, 0), ScalarType::Int);
}

KVCacheCall views_of(const KVCacheArgs& args, std::vector<Tensor>& host_copies) {
  KVCacheCall call;
  call.q = view_of(args.q);
  call.k_cache = args.k ? view_to_write(args.k_cache) : view_of(args.k_cache);
  call.v_cache = args.k ? view_to_write(args.v_cache) : view_of(args.v_cache);
  call.k = view_of(args.k);
  call.v = view_of(args.v);
  call.rotary_cos = view_of(args.rotary_cos);
  call.rotary_sin = view_of(args.rotary_sin);
  call.cache_seqlens = view_with_values(args.cache_seqlens, host_copies);
  call.cache_batch_idx = view_with_values(args.cache_batch_idx, host_copies);
  call.cache_leftpad = view_with_values(args.cache_leftpad, host_copies);
  call.block_table = view_with_values(args.block_table, host_copies);
  call.alibi_slopes = view_of(args.alibi_slopes);
  call.sinks = view_of(args.sinks);
  call.options = args;
  call.rotary_interleaved = args.rotary_interleaved;
  return call;
}

// The tensors of `attention`, which the core made of views.
AttentionArgs attention_over(const KVCacheArgs& args, const AttentionCall& attention) {
  AttentionArgs result{attention.options, args.q, tensor_like(args.k_cache, attention.k),
                       tensor_like(args.v_cache, attention.v)};
  result.seqused_k = args.cache_seqlens;
  result.leftpad_k = args.cache_leftpad;
  result.alibi_slopes = args.alibi_slopes;
  result.sinks = args.sinks;
  if (attention.paged()) {
    const OptionalTensor& table = args.block_table ? args.block_table : args.cache_batch_idx;
    result.block_table = tensor_like(*table, attention.block_table);
  }
  return result;
}

// Autograd counts the changes that pass the dispatcher: one of no element stands for those of a
// kernel, or through another view(). Tensors made in inference mode have no counter, and would
// refuse outside of it.
void count_change(const Tensor& cache) {
  if (aten<bool>("aten::is_inference", "", cache)) return;
  fill_(aten<Tensor>("aten::narrow", "", cache, 0, 0, 0), 0);
}

// By the kernel: one launch.
void append_by_kernel(const Instance& instance, const KVCacheArgs& args, const KVCacheCall& call,
                      AttentionArgs& attention) {
  AppendResults results;
  const Tensor seqused_k = empty({args.q.size(0)}, args.q, ScalarType::Int);
  results.seqused_k = view_to_write(seqused_k);
  attention.seqused_k = seqused_k;
  if (args.rotary_cos && args.rotary_cos->size(1) > 0) {
    attention.q = empty(args.q.sizes(), args.q, args.q.scalar_type());
    results.q_rotated = view_to_write(attention.q);
  }
  const LaunchOn where(args.q);
  check_status(anyflash_run_kvcache_append(&instance, &call, &attention, &results, where.get()));
}

// By plain operators.
void append_by_operators(const KVCacheArgs& args, AttentionArgs& attention) {
  const Tensor& first = *args.cache_seqlens;
  const int64_t batch = args.q.size(0), seqlen_new = args.k->size(1), seqlen_q = args.q.size(1);
  attention.seqused_k = longer(first, seqlen_new);
  const Tensor rows = positions(first, 0, seqlen_new);
  if (!args.rotary_cos) {
    append(args, *args.k, *args.v, rows);
    return;
  }
  const auto rotated = [&args](const Tensor& x, const Tensor& where) {
    return rotate(x, *args.rotary_cos, *args.rotary_sin, where, args.rotary_interleaved);
  };
  append(args, rotated(*args.k, rows), *args.v, rows);
  // Under a mask that moves with the query each row of q has its own position, else all stand at
  // the end of the cache.
  const bool moving_mask = attention.window_left >= 0 || attention.window_right >= 0;
  const Tensor q_rows = moving_mask ? positions(first, 0, seqlen_q)
                                    : expand(positions(first, 0, 1), {batch, seqlen_q});
  attention.q = rotated(args.q, q_rows);
}

}  // namespace

Tensor rotate(const Tensor& x, const Tensor& rotary_cos, const Tensor& rotary_sin,
              const Tensor& where, bool interleaved) {
  const int64_t batch = x.size(0), seqlen = x.size(1), half = rotary_cos.size(1);
  const ScalarType compute =
      x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  // Rows of q may reach beyond the table; what they see there is the last angle.
  const Tensor last = scalar(rotary_cos.size(0) - 1);
  const Tensor rows = reshape(aten<Tensor>("aten::minimum", "", where, last), {batch * seqlen});
  const auto angles = [&](const Tensor& table) {
    const Tensor picked = aten<Tensor>("aten::index_select", "", table, 0, rows);
    return reshape(to_dtype(picked, compute), {batch, seqlen, 1, half});
  };
  const Tensor cos = angles(rotary_cos), sin = angles(rotary_sin);

  // The two members of every pair: neighbours, or a half of rotary_dim apart.
  const auto members = [&](const Tensor& of) -> std::pair<Tensor, Tensor> {
    if (!interleaved) return {narrow(of, 3, 0, half), narrow(of, 3, half, half)};
    const Tensor pairs = split_dim(narrow(of, 3, 0, 2 * half), 3, 2);
    return {select(pairs, 4, 0), select(pairs, 4, 1)};
  };
  Tensor y = empty({batch, seqlen, x.size(2), x.size(3)}, x, x.scalar_type());
  const auto [x1, x2] = members(x);
  const auto [y1, y2] = members(y);
  const Tensor a = to_dtype(x1, compute), b = to_dtype(x2, compute);
  copy_(y1, sub(mul(a, cos), mul(b, sin)));
  copy_(y2, add(mul(a, sin), mul(b, cos)));
  const int64_t unrotated = x.size(3) - 2 * half;
  if (unrotated > 0) copy_(narrow(y, 3, 2 * half, unrotated), narrow(x, 3, 2 * half, unrotated));
  return y;
}

void append(const KVCacheArgs& args, const Tensor& k, const Tensor& v, const Tensor& rows) {
  MaybeTensors where;
  if (args.block_table) {
    const Tensor page_size = scalar(args.k_cache.size(1));
    const Tensor table = to_dtype(*args.block_table, ScalarType::Long);
    const Tensor page = aten<Tensor>("aten::floor_divide", "", rows, page_size);
    where = {aten<Tensor>("aten::gather", "", table, 1, page, false),
             aten<Tensor>("aten::remainder", "Tensor", rows, page_size)};
  } else {
    const Tensor owner = args.cache_batch_idx ? to_dtype(*args.cache_batch_idx, ScalarType::Long)
                                              : arange(args.q.size(0), args.q);
    where = {expand(unsqueeze(owner, 1), {args.q.size(0), k.size(1)}), rows};
  }
  // Through a view with a counter of its own: see count_change.
  const auto write = [&where](const Tensor& cache, const Tensor& rows_of_it) {
    aten<Tensor>("aten::index_put_", "", view(cache, cache.sizes(), cache.strides()), where,
                 rows_of_it, false);
  };
  write(args.k_cache, k);
  write(args.v_cache, v);
}

std::tuple<Tensor, Tensor> _flash_attn_kvcache_(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k,
    const OptionalTensor& v, const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin,
    const OptionalTensor& cache_seqlens, const OptionalTensor& cache_batch_idx,
    const OptionalTensor& cache_leftpad, const OptionalTensor& block_table,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, double softmax_scale,
    bool causal, int64_t window_left, int64_t window_right, double softcap, bool rotary_interleaved,
    bool return_lse, int64_t backend) {
  const NoGrad no_grad;
  KVCacheArgs args{{}, q, k_cache, v_cache};
  args.k = contiguous_rows(k);
  args.v = contiguous_rows(v);
  args.rotary_cos = contiguous_rows(rotary_cos);
  args.rotary_sin = contiguous_rows(rotary_sin);
  args.cache_seqlens = cache_seqlens;
  args.cache_batch_idx = cache_batch_idx;
  args.cache_leftpad = cache_leftpad;
  args.block_table = block_table;
  args.alibi_slopes = alibi_slopes;
  args.sinks = sinks;
  args.softmax_scale = softmax_scale;
  args.softcap = softcap;
  args.window_left = window_left;
  args.window_right = window_right;
  args.return_lse = return_lse;
  args.rotary_interleaved = rotary_interleaved;

  std::vector<Tensor> host_copies;
  const KVCacheCall call = views_of(args, host_copies);
  const Caller from = caller(backend);
  AttentionCall attention_call;
  Choice choice, append_choice;
  check_status(
      anyflash_prepare_kvcache(&call, causal, &from, &attention_call, &choice, &append_choice));
  AttentionArgs attention = attention_over(args, attention_call);
  if (append_choice.route != Route::none) {
    count_change(k_cache);
    count_change(v_cache);
    if (append_choice.route == Route::kernel) {
      append_by_kernel(*append_choice.instance, args, call, attention);
    } else {
      append_by_operators(args, attention);
    }
    attention_call.q = view_of(attention.q);
    attention_call.seqused_k = view_of(attention.seqused_k);
  }
  return run_forward(choice, attention, attention_call);
}

}  // namespace anyflash
