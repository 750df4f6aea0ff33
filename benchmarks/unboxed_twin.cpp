// The same schema as anyflash::_flash_attn_forward, registered the usual unboxed way and doing only
// the aten call: what the stable ABI, the validation and the decision cost is the difference.
// Compiled by bench_overhead.py, part of no library.
#include <ATen/ATen.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor> _flash_attn_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor&, const OptionalTensor&,
    c10::SymInt, c10::SymInt, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    double, double softmax_scale, bool causal, c10::SymInt, c10::SymInt, double, bool, bool,
    int64_t) {
  auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
      q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, std::nullopt,
      softmax_scale);
  return {out.transpose(1, 2), lse.contiguous(), q.new_empty({0}, at::kLong)};
}

}  // namespace

TORCH_LIBRARY(anyflash_bench, m) {
  m.def(
      "_flash_attn_forward(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? "
      "cu_seqlens_k, "
      "SymInt max_seqlen_q, SymInt "
      "max_seqlen_k, Tensor? seqused_k, Tensor? leftpad_k, Tensor? block_table, Tensor? "
      "alibi_slopes, Tensor? bias, Tensor? sinks, "
      "Tensor? rng_state, float dropout_p, float softmax_scale, bool causal, SymInt "
      "window_size_left, "
      "SymInt window_size_right, float softcap, bool deterministic, bool return_lse, "
      "int backend) -> (Tensor out, Tensor softmax_lse, Tensor rng_state)");
}

TORCH_LIBRARY_IMPL(anyflash_bench, CPU, m) { m.impl("_flash_attn_forward", _flash_attn_forward); }
