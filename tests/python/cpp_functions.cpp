// anyflash/attention.h as operators, for tests in Python.
#include <anyflash/attention.h>
#include <torch/library.h>

#include <tuple>

namespace {

using anyflash::FlashAttnOptions;
using anyflash::OptionalTensor;
using at::Tensor;
using Pair = std::tuple<Tensor, Tensor>;

Pair attention(const Tensor& q, const Tensor& k, const Tensor& v,
               const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
               int64_t max_seqlen_q, int64_t max_seqlen_k, const OptionalTensor& seqused_k,
               const OptionalTensor& leftpad_k, const OptionalTensor& block_table,
               const OptionalTensor& alibi_slopes, const OptionalTensor& bias,
               const OptionalTensor& sinks, const OptionalTensor& rng_state, double dropout_p,
               std::optional<double> softmax_scale, bool causal, at::IntArrayRef window_size,
               double softcap, bool deterministic) {
  Tensor lse;
  const FlashAttnOptions options{.dropout_p = dropout_p,
                                 .softmax_scale = softmax_scale,
                                 .causal = causal,
                                 .window_size = {window_size[0], window_size[1]},
                                 .softcap = softcap,
                                 .alibi_slopes = alibi_slopes,
                                 .deterministic = deterministic,
                                 .bias = bias,
                                 .sinks = sinks,
                                 .seqused_k = seqused_k,
                                 .leftpad_k = leftpad_k,
                                 .block_table = block_table,
                                 .rng_state = rng_state,
                                 .softmax_lse = &lse};
  const Tensor out = cu_seqlens_q ? anyflash::flash_attn_varlen_func(
                                        q, k, v, *cu_seqlens_q, cu_seqlens_k.value_or(Tensor()),
                                        max_seqlen_q, max_seqlen_k, options)
                                  : anyflash::flash_attn_func(q, k, v, options);
  return {out, lse};
}

Pair with_kvcache(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                  const OptionalTensor& k, const OptionalTensor& v,
                  const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin,
                  const OptionalTensor& cache_seqlens, bool causal, bool rotary_interleaved) {
  Tensor lse;
  const Tensor out = anyflash::flash_attn_with_kvcache(q, k_cache, v_cache,
                                                       {.k = k,
                                                        .v = v,
                                                        .rotary_cos = rotary_cos,
                                                        .rotary_sin = rotary_sin,
                                                        .cache_seqlens = cache_seqlens,
                                                        .causal = causal,
                                                        .rotary_interleaved = rotary_interleaved,
                                                        .softmax_lse = &lse});
  return {out, lse};
}

FlashAttnOptions causal() { return {.causal = true}; }

TORCH_LIBRARY(anyflash_header, library) {
  library.def(
      "attention(Tensor q, Tensor k, Tensor v, *, Tensor? cu_seqlens_q=None, "
      "Tensor? cu_seqlens_k=None, int max_seqlen_q=0, int max_seqlen_k=0, Tensor? seqused_k=None, "
      "Tensor? leftpad_k=None, Tensor? block_table=None, Tensor? alibi_slopes=None, "
      "Tensor? bias=None, Tensor? sinks=None, Tensor? rng_state=None, float dropout_p=0.0, "
      "float? softmax_scale=None, bool causal=False, int[2] window_size=[-1, -1], "
      "float softcap=0.0, bool deterministic=False) -> (Tensor, Tensor)",
      attention);
  library.def(
      "with_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k=None, "
      "Tensor? v=None, *, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
      "Tensor? cache_seqlens=None, bool causal=False, bool rotary_interleaved=True) -> (Tensor, "
      "Tensor)",
      with_kvcache);
  // The packed forms, causal.
  library.def("qkvpacked(Tensor qkv) -> Tensor",
              [](const Tensor& qkv) { return anyflash::flash_attn_qkvpacked_func(qkv, causal()); });
  library.def("kvpacked(Tensor q, Tensor kv) -> Tensor", [](const Tensor& q, const Tensor& kv) {
    return anyflash::flash_attn_kvpacked_func(q, kv, causal());
  });
  library.def("varlen_qkvpacked(Tensor qkv, Tensor cu_seqlens, int max_seqlen) -> Tensor",
              [](const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_seqlen) {
                return anyflash::flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen,
                                                                  causal());
              });
  library.def("varlen_kvpacked(Tensor q, Tensor kv, Tensor cu_seqlens, int max_seqlen) -> Tensor",
              [](const Tensor& q, const Tensor& kv, const Tensor& cu_seqlens, int64_t max_seqlen) {
                return anyflash::flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens,
                                                                 max_seqlen, max_seqlen, causal());
              });
  library.def("undefined_options(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)",
              [](const Tensor& q, const Tensor& k, const Tensor& v) {
                const Tensor none;
                const Tensor out = anyflash::flash_attn_func(q, k, v,
                                                             {.alibi_slopes = none,
                                                              .bias = none,
                                                              .sinks = none,
                                                              .seqused_k = none,
                                                              .leftpad_k = none,
                                                              .block_table = none,
                                                              .rng_state = none});
                Tensor k_cache = k.clone(), v_cache = v.clone();
                const Tensor cached = anyflash::flash_attn_with_kvcache(q, k_cache, v_cache,
                                                                        {.k = none,
                                                                         .v = none,
                                                                         .rotary_cos = none,
                                                                         .rotary_sin = none,
                                                                         .cache_seqlens = none,
                                                                         .block_table = none,
                                                                         .alibi_slopes = none,
                                                                         .sinks = none});
                return std::make_tuple(out, cached);
              });
}

}  // namespace
