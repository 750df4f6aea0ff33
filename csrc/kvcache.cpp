#include "kvcache.h"

#include "attention_run.h"
#include "describe.h"
#include "dispatch.h"
#include "operators.h"
#include "stable/aten.h"
#include "stable/grad_mode.h"

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

// The caches as attention sees them. A cache whose rows are picked by cache_batch_idx is a paged
// one with one page per sequence.
AttentionArgs attention_over(const KVCacheCall& call, int64_t window_left, int64_t window_right) {
  AttentionArgs args{call.q, call.k_cache, call.v_cache};
  args.seqused_k = call.cache_seqlens;
  args.leftpad_k = call.cache_leftpad;
  args.alibi_slopes = call.alibi_slopes;
  args.sinks = call.sinks;
  args.softmax_scale = call.softmax_scale;
  args.softcap = call.softcap;
  args.window_left = window_left;
  args.window_right = window_right;
  if (call.block_table) {
    args.block_table = call.block_table;
  } else if (call.cache_batch_idx) {
    args.block_table = unsqueeze(*call.cache_batch_idx, 1);
  } else if (call.k_cache.size(0) > call.batch()) {
    args.k = narrow(call.k_cache, 0, 0, call.batch());
    args.v = narrow(call.v_cache, 0, 0, call.batch());
  }
  return args;
}

// Autograd counts the changes that pass the dispatcher: one of no element stands for the kernel's.
// Tensors made in inference mode have no counter, and would refuse outside of it.
void count_change(const Tensor& cache) {
  if (aten<bool>("aten::is_inference", "", cache)) return;
  fill_(aten<Tensor>("aten::narrow", "", cache, 0, 0, 0), 0);
}

// Appends the new keys and values; q comes back rotated where rotary tables are given.
void append_and_rotate(const KVCacheCall& call, AttentionArgs& args, int64_t backend) {
  const Tensor& first = *call.cache_seqlens;
  const int64_t seqlen_new = call.seqlen_new(), seqlen_q = call.q.size(1);
  // Under a mask that moves with the query each row of q has its own position, else all stand at
  // the end of the cache.
  const bool moving_mask = args.window_left >= 0 || args.window_right >= 0;
  const Choice choice = choose(describe_kvcache_append(call.k_cache, call.v_cache, backend));
  if (choice.route == Route::kernel) {
    count_change(call.k_cache);
    count_change(call.v_cache);
    const kernel::Appended appended = kernel::append(*choice.instance, call, moving_mask);
    args.q = appended.q;
    args.seqused_k = appended.seqused_k;
    return;
  }
  args.seqused_k = longer(first, seqlen_new);
  const Tensor rows = positions(first, 0, seqlen_new);
  if (!call.rotary_cos) {
    append(call, *call.k, *call.v, rows);
    return;
  }
  const auto rotated = [&call](const Tensor& x, const Tensor& where) {
    return rotate(x, *call.rotary_cos, *call.rotary_sin, where, call.rotary_interleaved);
  };
  append(call, rotated(*call.k, rows), *call.v, rows);
  const Tensor q_rows = moving_mask ? positions(first, 0, seqlen_q)
                                    : expand(positions(first, 0, 1), {call.batch(), seqlen_q});
  args.q = rotated(call.q, q_rows);
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

void append(const KVCacheCall& call, const Tensor& k, const Tensor& v, const Tensor& rows) {
  MaybeTensors where;
  if (call.block_table) {
    const Tensor page_size = scalar(call.k_cache.size(1));
    const Tensor table = to_dtype(*call.block_table, ScalarType::Long);
    const Tensor page = aten<Tensor>("aten::floor_divide", "", rows, page_size);
    where = {aten<Tensor>("aten::gather", "", table, 1, page, false),
             aten<Tensor>("aten::remainder", "Tensor", rows, page_size)};
  } else {
    const Tensor owner = call.cache_batch_idx ? to_dtype(*call.cache_batch_idx, ScalarType::Long)
                                              : arange(call.batch(), call.q);
    where = {expand(unsqueeze(owner, 1), {call.batch(), call.seqlen_new()}), rows};
  }
  aten<Tensor>("aten::index_put_", "", call.k_cache, where, k, false);
  aten<Tensor>("aten::index_put_", "", call.v_cache, where, v, false);
}

std::tuple<Tensor, Tensor> _flash_attn_kvcache_(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k,
    const OptionalTensor& v, const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin,
    const OptionalTensor& cache_seqlens, const OptionalTensor& cache_batch_idx,
    const OptionalTensor& cache_leftpad, const OptionalTensor& block_table,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, double softmax_scale,
    bool causal, int64_t window_left, int64_t window_right, double softcap, bool rotary_interleaved,
    int64_t backend) {
  const NoGrad no_grad;
  KVCacheCall call{q, k_cache, v_cache};
  call.k = k;
  call.v = v;
  call.rotary_cos = rotary_cos;
  call.rotary_sin = rotary_sin;
  call.cache_seqlens = cache_seqlens;
  call.cache_batch_idx = cache_batch_idx;
  call.cache_leftpad = cache_leftpad;
  call.block_table = block_table;
  call.alibi_slopes = alibi_slopes;
  call.sinks = sinks;
  call.softmax_scale = softmax_scale;
  call.softcap = softcap;
  call.rotary_interleaved = rotary_interleaved;
  validate_kvcache(call);
  AttentionArgs args = attention_over(call, window_left, window_right);
  normalise(args, causal);
  const Choice choice = choose_forward(args, backend);  // who refuses leaves the caches alone
  if (call.seqlen_new() > 0 && call.batch() > 0) append_and_rotate(call, args, backend);
  return run_forward(choice, args);
}

}  // namespace anyflash
