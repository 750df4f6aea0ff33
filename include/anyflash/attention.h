// flash_attn's functions for LibTorch programs: torch::Tensor in and out, upstream's names and
// defaults, differentiable.
//
//   #include <anyflash/attention.h>
//   at::Tensor out = anyflash::flash_attn_func(q, k, v, {.causal = true});
//
// Only a header, compiled with the LibTorch of the program, 2.10 or newer. What it calls are the
// operators of libanyflash_ops.so, which CMake's target anyflash::ops links. The braces with names
// are C++20; in C++17 set the members of a FlashAttnOptions.
//
// Shapes  dense   q (batch, seqlen_q, heads, head_dim), k (batch, seqlen_k, heads_k, head_dim),
//                 v (batch, seqlen_k, heads_k, head_dim_v); without the batch: one sequence
//         packed  q (total_q, heads, head_dim), k and v (total_k, heads_k, ...)
//         paged   k and v (num_blocks, page_size, heads_k, ...)
//         result  q's, with head_dim_v columns
//         heads_k divides heads; head_dim is 1 to 512.
// Dtypes  fp16, bf16, fp32 or fp64, the same for q, k and v; indices int32.
// Errors  c10::Error (a std::exception) whose text names the argument, what came and what was
//         expected; at the backward where a gradient was asked for that there is not. There is no
//         second derivative and no forward-mode one: both are refused.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "anyflash/autograd.h"

namespace anyflash {

// What the functions take beside their tensors. An undefined tensor is none.
struct FlashAttnOptions {
  double dropout_p = 0.0;                         // in [0, 1)
  std::optional<double> softmax_scale = {};       // head_dim ** -0.5
  bool causal = false;                            // query i sees keys up to i + seqlen_k - seqlen_q
  std::array<int64_t, 2> window_size = {-1, -1};  // keys left and right of that; -1: all
  double softcap = 0.0;                           // > 0: scores are softcap * tanh(score / softcap)
  OptionalTensor alibi_slopes = {};               // (heads) or (batch, heads) fp32; no gradient
  bool deterministic = false;                     // the backward adds in a fixed order
  // What upstream's functions do not have:
  OptionalTensor bias = {};           // additive, or boolean, true = visible; broadcasts to (batch,
                                      // heads, seqlen_q, seqlen_k); differentiable
  OptionalTensor sinks = {};          // (heads), one more logit per head; differentiable
  OptionalTensor seqused_k = {};      // (batch) keys that each sequence has
  OptionalTensor leftpad_k = {};      // (batch) leading keys to skip
  OptionalTensor block_table = {};    // (batch, max_blocks) pages of each sequence; no gradient
  OptionalTensor rng_state = {};      // (2) int64 seed and offset of the dropout; else drawn
  at::Tensor* softmax_lse = nullptr;  // receives the log-sum-exp: fp32 (fp64 for fp64), (batch,
                                      // heads, seqlen_q), packed (heads, total_q); differentiable
};

// What flash_attn_with_kvcache takes beside its tensors.
struct KVCacheOptions {
  OptionalTensor k = {};  // (batch, seqlen_new, heads_k, head_dim) to append
  OptionalTensor v = {};
  OptionalTensor rotary_cos = {};  // (seqlen_rotary, rotary_dim / 2) in q's dtype: q, k are turned
  OptionalTensor rotary_sin = {};
  OptionalTensor cache_seqlens = {};    // (batch) keys before the call; else the whole cache
  OptionalTensor cache_batch_idx = {};  // (batch) the row of the cache of each sequence
  OptionalTensor cache_leftpad = {};    // (batch) leading rows to skip
  OptionalTensor block_table = {};      // (batch, max_blocks) pages of each sequence
  std::optional<double> softmax_scale = {};
  bool causal = false;
  std::array<int64_t, 2> window_size = {-1, -1};
  double softcap = 0.0;
  bool rotary_interleaved = true;  // pairs are neighbours, else half of rotary_dim apart
  OptionalTensor alibi_slopes = {};
  OptionalTensor sinks = {};
  at::Tensor* softmax_lse = nullptr;  // receives the log-sum-exp (batch, heads, seqlen_q)
};

namespace detail {

// The rows' elements side by side, as the kernels want them.
inline Tensor contiguous_rows(const Tensor& x) {
  return x.dim() == 0 || x.stride(-1) == 1 ? x : x.contiguous();
}

inline double scale_of(const std::optional<double>& softmax_scale, const Tensor& q) {
  if (softmax_scale) return *softmax_scale;
  TORCH_CHECK(q.dim() >= 1 && q.size(-1) > 0, "q: expected (..., heads, head_dim), got ",
              q.sizes());
  return 1.0 / std::sqrt(static_cast<double>(q.size(-1)));
}

inline Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, Call call,
                     const FlashAttnOptions& options) {
  const OptionalTensor alibi_slopes = given(options.alibi_slopes), bias = given(options.bias),
                       sinks = given(options.sinks);
  const bool records = needs_autograd(q) || needs_autograd(k) || needs_autograd(v) ||
                       needs_autograd(alibi_slopes) || needs_autograd(bias) ||
                       needs_autograd(sinks);
  call.seqused_k = given(options.seqused_k);
  call.leftpad_k = given(options.leftpad_k);
  call.block_table = given(options.block_table);
  call.rng_state = given(options.rng_state);
  call.dropout_p = options.dropout_p;
  call.softmax_scale = scale_of(options.softmax_scale, q);
  call.causal = options.causal;
  call.window_size = options.window_size;
  call.softcap = options.softcap;
  call.deterministic = options.deterministic;
  // A backward needs it; over pages there is none.
  call.return_lse = options.softmax_lse != nullptr || (records && !call.block_table);
  const Tensor rows_q = contiguous_rows(q), rows_k = contiguous_rows(k),
               rows_v = contiguous_rows(v);
  Tensor out, lse;
  if (records) {
    const variable_list results =
        Attention::apply(rows_q, rows_k, rows_v, alibi_slopes, bias, sinks, call);
    out = results[0];
    lse = results[1];
  } else {
    std::tie(out, lse, std::ignore) =
        forward(rows_q, rows_k, rows_v, alibi_slopes, bias, sinks, call);
  }
  if (options.softmax_lse != nullptr) *options.softmax_lse = lse;
  return out;
}

// One of the tensors that lie beside each other in dimension `dim`.
inline Tensor part(const Tensor& packed, const char* name, int64_t dim, int64_t parts,
                   int64_t index) {
  TORCH_CHECK(packed.dim() == dim + 3 && packed.size(dim) == parts, name, ": expected (",
              dim == 2 ? "batch, seqlen, " : "total, ", parts, ", heads, head_dim), got ",
              packed.sizes());
  return packed.select(dim, index);
}

}  // namespace detail

// softmax(q k^T) v of dense tensors, or, paged, of keys in pages.
inline at::Tensor flash_attn_func(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                  const FlashAttnOptions& options = {}) {
  if (q.dim() != 3) return detail::attend(q, k, v, {}, options);
  TORCH_CHECK(k.dim() == 3 && v.dim() == 3, "k, v: expected (seqlen_k, heads_k, head_dim) like q ",
              q.sizes(), ", got ", k.sizes(), " and ", v.sizes());
  at::Tensor out = detail::attend(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), {}, options);
  if (options.softmax_lse != nullptr) *options.softmax_lse = options.softmax_lse->squeeze(0);
  return out.squeeze(0);
}

// kv (batch, seqlen_k, 2, heads_k, head_dim).
inline at::Tensor flash_attn_kvpacked_func(const at::Tensor& q, const at::Tensor& kv,
                                           const FlashAttnOptions& options = {}) {
  using detail::part;
  return flash_attn_func(q, part(kv, "kv", 2, 2, 0), part(kv, "kv", 2, 2, 1), options);
}

// qkv (batch, seqlen, 3, heads, head_dim).
inline at::Tensor flash_attn_qkvpacked_func(const at::Tensor& qkv,
                                            const FlashAttnOptions& options = {}) {
  using detail::part;
  return flash_attn_func(part(qkv, "qkv", 2, 3, 0), part(qkv, "qkv", 2, 3, 1),
                         part(qkv, "qkv", 2, 3, 2), options);
}

// Packed sequences: cu_seqlens_q and cu_seqlens_k (batch + 1) say where each begins, and the end;
// max_seqlen_q and max_seqlen_k are the longest lengths, or more. With options.block_table k and v
// are paged; with options.seqused_k too cu_seqlens_k may be undefined, at::Tensor().
inline at::Tensor flash_attn_varlen_func(const at::Tensor& q, const at::Tensor& k,
                                         const at::Tensor& v, const at::Tensor& cu_seqlens_q,
                                         const at::Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                                         int64_t max_seqlen_k,
                                         const FlashAttnOptions& options = {}) {
  detail::Call call{};
  call.cu_seqlens_q = cu_seqlens_q;
  call.cu_seqlens_k = detail::given(cu_seqlens_k);
  call.max_seqlen_q = max_seqlen_q;
  call.max_seqlen_k = max_seqlen_k;
  return detail::attend(q, k, v, call, options);
}

// kv (total_k, 2, heads_k, head_dim).
inline at::Tensor flash_attn_varlen_kvpacked_func(const at::Tensor& q, const at::Tensor& kv,
                                                  const at::Tensor& cu_seqlens_q,
                                                  const at::Tensor& cu_seqlens_k,
                                                  int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                  const FlashAttnOptions& options = {}) {
  using detail::part;
  return flash_attn_varlen_func(q, part(kv, "kv", 1, 2, 0), part(kv, "kv", 1, 2, 1), cu_seqlens_q,
                                cu_seqlens_k, max_seqlen_q, max_seqlen_k, options);
}

// qkv (total, 3, heads, head_dim).
inline at::Tensor flash_attn_varlen_qkvpacked_func(const at::Tensor& qkv,
                                                   const at::Tensor& cu_seqlens, int64_t max_seqlen,
                                                   const FlashAttnOptions& options = {}) {
  using detail::part;
  return flash_attn_varlen_func(part(qkv, "qkv", 1, 3, 0), part(qkv, "qkv", 1, 3, 1),
                                part(qkv, "qkv", 1, 3, 2), cu_seqlens, cu_seqlens, max_seqlen,
                                max_seqlen, options);
}

// Appends options.k and options.v to the caches in place, turned where rotary tables are given,
// then attends over the caches. q (batch, seqlen_q, heads, head_dim); k_cache (batch_cache,
// capacity, heads_k, head_dim), with options.block_table (num_blocks, page_size, heads_k,
// head_dim); v_cache the same. There is no gradient: a backward through the result is refused.
inline at::Tensor flash_attn_with_kvcache(const at::Tensor& q, at::Tensor k_cache,
                                          at::Tensor v_cache, const KVCacheOptions& options = {}) {
  using detail::given;
  using detail::needs_autograd;
  static const auto attention =
      detail::find_operator<detail::KVCache>("anyflash::_flash_attn_kvcache_");
  at::Tensor out, lse;
  {
    const at::NoGradGuard no_grad;
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    std::tie(out, lse) = attention.call(
        detail::contiguous_rows(q), k_cache, v_cache, given(options.k), given(options.v),
        given(options.rotary_cos), given(options.rotary_sin), given(options.cache_seqlens),
        given(options.cache_batch_idx), given(options.cache_leftpad), given(options.block_table),
        given(options.alibi_slopes), given(options.sinks),
        detail::scale_of(options.softmax_scale, q), options.causal, options.window_size[0],
        options.window_size[1], options.softcap, options.rotary_interleaved,
        /*return_lse=*/options.softmax_lse != nullptr, /*backend=*/0);
  }
  if (given(options.k)) {  // autograd notices where it saved what is overwritten
    for (const at::Tensor& cache : {k_cache, v_cache}) {
      if (!cache.is_inference()) cache.unsafeGetTensorImpl()->bump_version();
    }
  }
  torch::autograd::variable_list causes{q, k_cache, v_cache};
  for (const auto* x : {&options.k, &options.v, &options.rotary_cos, &options.rotary_sin,
                        &options.alibi_slopes, &options.sinks}) {
    if (given(*x)) causes.push_back(**x);
  }
  bool asked = false;
  for (const at::Tensor& x : causes) asked = asked || needs_autograd(x);
  if (asked) {
    const auto bound = detail::refuse(
        {out, lse}, causes,
        "q, k, v: attention over a key/value cache has no gradient, but a backward went through "
        "its result; expected a call under torch::NoGradGuard, or flash_attn_func without a cache");
    out = bound[0];
    lse = bound[1];
  }
  if (options.softmax_lse != nullptr) *options.softmax_lse = lse;
  return out;
}

}  // namespace anyflash
