// The operators of schemas.def as C++ functions, one per schema and in its argument order. ops.cpp
// registers them.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "attention/arguments.h"

namespace anyflash {

std::tuple<Tensor, Tensor, Tensor> _flash_attn_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    const OptionalTensor& seqused_k, const OptionalTensor& leftpad_k,
    const OptionalTensor& block_table, const OptionalTensor& alibi_slopes,
    const OptionalTensor& bias, const OptionalTensor& sinks, const OptionalTensor& rng_state,
    double dropout_p, double softmax_scale, bool causal, int64_t window_left, int64_t window_right,
    double softcap, bool deterministic, bool return_lse, int64_t backend);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> _flash_attn_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const OptionalTensor& dlse, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    const OptionalTensor& seqused_k, const OptionalTensor& leftpad_k,
    const OptionalTensor& alibi_slopes, const OptionalTensor& bias, const OptionalTensor& sinks,
    const OptionalTensor& rng_state, double dropout_p, double softmax_scale, bool causal,
    int64_t window_left, int64_t window_right, double softcap, bool deterministic,
    bool bias_requires_grad, bool sinks_requires_grad, int64_t backend);

std::tuple<Tensor, Tensor> _flash_attn_kvcache_(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k,
    const OptionalTensor& v, const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin,
    const OptionalTensor& cache_seqlens, const OptionalTensor& cache_batch_idx,
    const OptionalTensor& cache_leftpad, const OptionalTensor& block_table,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, double softmax_scale,
    bool causal, int64_t window_left, int64_t window_right, double softcap, bool rotary_interleaved,
    bool return_lse, int64_t backend);

Tensor _bias_activation_forward(const Tensor& x, const OptionalTensor& bias, int64_t activation,
                                int64_t backend);
std::tuple<Tensor, Tensor> _bias_activation_backward(const Tensor& dy, const Tensor& x,
                                                     const OptionalTensor& bias, int64_t activation,
                                                     int64_t backend);

std::tuple<Tensor, Tensor> _fused_mlp_forward(const Tensor& x, const Tensor& weight1,
                                              const OptionalTensor& bias1, const Tensor& weight2,
                                              const OptionalTensor& bias2, int64_t activation,
                                              bool save_hidden, int64_t backend);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> _fused_mlp_backward(
    const Tensor& dout, const Tensor& x, const Tensor& weight1, const OptionalTensor& bias1,
    const Tensor& weight2, const Tensor& hidden, bool bias2_requires_grad, int64_t activation,
    int64_t backend);

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin,
              const OptionalTensor& seqlen_offsets, int64_t seqlen_offset,
              const OptionalTensor& cu_seqlens, int64_t max_seqlen, bool interleaved,
              bool conjugate);
void rotary_(const Tensor& x, const Tensor& cos, const Tensor& sin,
             const OptionalTensor& seqlen_offsets, int64_t seqlen_offset,
             const OptionalTensor& cu_seqlens, int64_t max_seqlen, bool interleaved,
             bool conjugate);
std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(
    const Tensor& logits, const Tensor& labels, const OptionalTensor& precomputed_lse,
    double smoothing, double logit_scale, double lse_square_scale, int64_t ignore_index,
    int64_t class_start_idx, int64_t total_classes);
Tensor cross_entropy_backward(const Tensor& dlosses, const Tensor& logits, const Tensor& labels,
                              const Tensor& lse, double smoothing, double logit_scale,
                              double lse_square_scale, int64_t ignore_index,
                              int64_t class_start_idx, int64_t total_classes);
void cross_entropy_backward_(const Tensor& dlosses, const Tensor& logits, const Tensor& labels,
                             const Tensor& lse, double smoothing, double logit_scale,
                             double lse_square_scale, int64_t ignore_index, int64_t class_start_idx,
                             int64_t total_classes);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_forward(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& x1, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& weight1, const OptionalTensor& bias1,
    const OptionalTensor& rowscale, const OptionalTensor& dropout_mask,
    const OptionalTensor& dropout_mask1, double dropout_p, double eps, bool is_rms_norm,
    bool zero_centered_weight, int64_t out_dtype, int64_t residual_dtype);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_backward(
    const Tensor& dy, const OptionalTensor& dy1, const OptionalTensor& dresidual_out,
    const Tensor& z, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& weight1, const OptionalTensor& bias1,
    const OptionalTensor& rowscale, const OptionalTensor& dropout_mask,
    const OptionalTensor& dropout_mask1, const OptionalTensor& x, double dropout_p,
    bool is_rms_norm, bool zero_centered_weight, bool has_residual, bool has_x1, int64_t x_dtype);

Tensor flash_attn_func(const Tensor& q, const Tensor& k, const Tensor& v, double dropout_p,
                       std::optional<double> softmax_scale, bool causal,
                       const std::vector<int64_t>& window_size, double softcap,
                       const OptionalTensor& alibi_slopes, bool deterministic);
Tensor flash_attn_kvpacked_func(const Tensor& q, const Tensor& kv, double dropout_p,
                                std::optional<double> softmax_scale, bool causal,
                                const std::vector<int64_t>& window_size, double softcap,
                                const OptionalTensor& alibi_slopes, bool deterministic);
Tensor flash_attn_qkvpacked_func(const Tensor& qkv, double dropout_p,
                                 std::optional<double> softmax_scale, bool causal,
                                 const std::vector<int64_t>& window_size, double softcap,
                                 const OptionalTensor& alibi_slopes, bool deterministic);
Tensor flash_attn_varlen_func(const Tensor& q, const Tensor& k, const Tensor& v,
                              const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                              int64_t max_seqlen_q, int64_t max_seqlen_k, double dropout_p,
                              std::optional<double> softmax_scale, bool causal,
                              const std::vector<int64_t>& window_size, double softcap,
                              const OptionalTensor& alibi_slopes, bool deterministic,
                              const OptionalTensor& block_table);
Tensor flash_attn_varlen_kvpacked_func(const Tensor& q, const Tensor& kv,
                                       const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                       int64_t max_seqlen_q, int64_t max_seqlen_k, double dropout_p,
                                       std::optional<double> softmax_scale, bool causal,
                                       const std::vector<int64_t>& window_size, double softcap,
                                       const OptionalTensor& alibi_slopes, bool deterministic);
Tensor flash_attn_varlen_qkvpacked_func(const Tensor& qkv, const Tensor& cu_seqlens,
                                        int64_t max_seqlen, double dropout_p,
                                        std::optional<double> softmax_scale, bool causal,
                                        const std::vector<int64_t>& window_size, double softcap,
                                        const OptionalTensor& alibi_slopes, bool deterministic);
Tensor flash_attn_with_kvcache(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k,
    const OptionalTensor& v, const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin,
    const OptionalTensor& cache_seqlens, const OptionalTensor& cache_batch_idx,
    const OptionalTensor& cache_leftpad, const OptionalTensor& block_table,
    std::optional<double> softmax_scale, bool causal, const std::vector<int64_t>& window_size,
    double softcap, bool rotary_interleaved, const OptionalTensor& alibi_slopes,
    int64_t num_splits);
Tensor fused_mlp(const Tensor& x, const Tensor& weight1, const OptionalTensor& bias1,
                 const Tensor& weight2, const OptionalTensor& bias2, const std::string& activation,
                 bool recompute);

}  // namespace anyflash
