// The operators under the original library's names and defaults, for C++ and TorchScript: the
// output alone comes back.
#include <array>
#include <cmath>

#include "operators.h"
#include "stable/aten.h"
#include "stable/contiguous_rows.h"
#include "stable/grad_mode.h"

namespace anyflash {
namespace {

// The arguments that all of them have.
struct Options {
  double dropout_p;
  std::optional<double> softmax_scale;
  bool causal;
  const std::vector<int64_t>& window_size;
  double softcap;
  const OptionalTensor& alibi_slopes;
};

// Packed sequences, where the call has them.
struct Packing {
  OptionalTensor cu_seqlens_q;
  OptionalTensor cu_seqlens_k;
  int64_t max_seqlen_q = 0;
  int64_t max_seqlen_k = 0;
  OptionalTensor block_table;
};

// "(2, 77, 8, 64)" and "(12,)", as Python prints shapes.
std::string shape_text(const Tensor& x) {
  std::string sizes;
  for (const int64_t size : x.sizes()) sizes += text(sizes.empty() ? "" : ", ", size);
  return text("(", sizes, x.dim() == 1 ? ",)" : ")");
}

std::array<int64_t, 2> window_of(const std::vector<int64_t>& window_size) {
  AF_CHECK(window_size.size() == 2, "window_size: expected (left, right), got ", window_size.size(),
           " numbers");
  return {window_size[0], window_size[1]};
}

double scale_of(const std::optional<double>& softmax_scale, const Tensor& q) {
  if (softmax_scale) return *softmax_scale;
  AF_CHECK(q.dim() >= 1 && q.size(q.dim() - 1) > 0, "q: expected (..., heads, head_dim), got ",
           shape_text(q));
  return 1.0 / std::sqrt(static_cast<double>(q.size(q.dim() - 1)));
}

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Packing& packing,
              const Options& options) {
  const NoGrad no_grad;
  const auto [left, right] = window_of(options.window_size);
  const double scale = scale_of(options.softmax_scale, q);
  return std::get<0>(_flash_attn_forward(
      contiguous_rows(q), contiguous_rows(k), contiguous_rows(v), packing.cu_seqlens_q,
      packing.cu_seqlens_k, packing.max_seqlen_q, packing.max_seqlen_k, std::nullopt, std::nullopt,
      packing.block_table, options.alibi_slopes, std::nullopt, std::nullopt,
      /*rng_state=*/std::nullopt, options.dropout_p, scale, options.causal, left, right,
      options.softcap, /*deterministic=*/false, /*return_lse=*/false, /*backend=*/0));
}

Tensor attend_dense(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options) {
  if (q.dim() != 3) return attend(q, k, v, Packing{}, options);
  // (total, heads, head_dim) is one sequence.
  AF_CHECK(k.dim() == 3 && v.dim() == 3, "k, v: expected (seqlen_k, heads_k, head_dim) like q ",
           shape_text(q), ", got ", shape_text(k), " and ", shape_text(v));
  return select(attend(unsqueeze(q, 0), unsqueeze(k, 0), unsqueeze(v, 0), Packing{}, options), 0,
                0);
}

// One of the tensors that lie beside each other in dimension `dim`.
Tensor part(const Tensor& packed, const char* name, int64_t dim, int64_t parts, int64_t index) {
  AF_CHECK(packed.dim() == dim + 3 && packed.size(dim) == parts, name, ": expected (",
           dim == 2 ? "batch, seqlen, " : "total, ", parts, ", heads, head_dim), got ",
           shape_text(packed));
  return select(packed, dim, index);
}

}  // namespace

Tensor flash_attn_func(const Tensor& q, const Tensor& k, const Tensor& v, double dropout_p,
                       std::optional<double> softmax_scale, bool causal,
                       const std::vector<int64_t>& window_size, double softcap,
                       const OptionalTensor& alibi_slopes, bool /*deterministic*/) {
  return attend_dense(q, k, v,
                      {dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes});
}

Tensor flash_attn_kvpacked_func(const Tensor& q, const Tensor& kv, double dropout_p,
                                std::optional<double> softmax_scale, bool causal,
                                const std::vector<int64_t>& window_size, double softcap,
                                const OptionalTensor& alibi_slopes, bool /*deterministic*/) {
  return attend(q, part(kv, "kv", 2, 2, 0), part(kv, "kv", 2, 2, 1), Packing{},
                {dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes});
}

Tensor flash_attn_qkvpacked_func(const Tensor& qkv, double dropout_p,
                                 std::optional<double> softmax_scale, bool causal,
                                 const std::vector<int64_t>& window_size, double softcap,
                                 const OptionalTensor& alibi_slopes, bool /*deterministic*/) {
  return attend(part(qkv, "qkv", 2, 3, 0), part(qkv, "qkv", 2, 3, 1), part(qkv, "qkv", 2, 3, 2),
                Packing{}, {dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes});
}

Tensor flash_attn_varlen_func(const Tensor& q, const Tensor& k, const Tensor& v,
                              const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                              int64_t max_seqlen_q, int64_t max_seqlen_k, double dropout_p,
                              std::optional<double> softmax_scale, bool causal,
                              const std::vector<int64_t>& window_size, double softcap,
                              const OptionalTensor& alibi_slopes, bool /*deterministic*/,
                              const OptionalTensor& block_table) {
  return attend(q, k, v, {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table},
                {dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes});
}

Tensor flash_attn_varlen_kvpacked_func(const Tensor& q, const Tensor& kv,
                                       const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                       int64_t max_seqlen_q, int64_t max_seqlen_k, double dropout_p,
                                       std::optional<double> softmax_scale, bool causal,
                                       const std::vector<int64_t>& window_size, double softcap,
                                       const OptionalTensor& alibi_slopes, bool /*deterministic*/) {
  return attend(q, part(kv, "kv", 1, 2, 0), part(kv, "kv", 1, 2, 1),
                {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, std::nullopt},
                {dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes});
}

Tensor flash_attn_varlen_qkvpacked_func(const Tensor& qkv, const Tensor& cu_seqlens,
                                        int64_t max_seqlen, double dropout_p,
                                        std::optional<double> softmax_scale, bool causal,
                                        const std::vector<int64_t>& window_size, double softcap,
                                        const OptionalTensor& alibi_slopes,
                                        bool /*deterministic*/) {
  return attend(part(qkv, "qkv", 1, 3, 0), part(qkv, "qkv", 1, 3, 1), part(qkv, "qkv", 1, 3, 2),
                {cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, std::nullopt},
                {dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes});
}

Tensor flash_attn_with_kvcache(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k,
    const OptionalTensor& v, const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin,
    const OptionalTensor& cache_seqlens, const OptionalTensor& cache_batch_idx,
    const OptionalTensor& cache_leftpad, const OptionalTensor& block_table,
    std::optional<double> softmax_scale, bool causal, const std::vector<int64_t>& window_size,
    double softcap, bool rotary_interleaved, const OptionalTensor& alibi_slopes,
    int64_t num_splits) {
  const NoGrad no_grad;
  AF_CHECK(num_splits <= 128, "num_splits > 128 not supported, got ", num_splits);
  const auto [left, right] = window_of(window_size);
  return std::get<0>(_flash_attn_kvcache_(
      contiguous_rows(q), k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens,
      cache_batch_idx, cache_leftpad, block_table, alibi_slopes, std::nullopt,
      scale_of(softmax_scale, q), causal, left, right, softcap, rotary_interleaved,
      /*return_lse=*/false, /*backend=*/0));
}

}  // namespace anyflash
