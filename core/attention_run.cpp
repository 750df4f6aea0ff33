#include <cstring>
#include <limits>

#include "core/attention.h"
#include "core/run.h"

namespace anyflash {
namespace {

RowStatistics statistics_of(const TensorView& x) {
  auto* data = static_cast<float*>(x.data);
  if (x.rank == 2) return {data, 0, x.strides[0]};
  return {data, x.strides[0], x.strides[1]};
}

// Strides that let a dimension of 1 broadcast, of at most four.
void copy_broadcast_strides(const TensorView& x, int64_t* strides) {
  const int32_t missing = 4 - x.rank;
  for (int32_t i = 0; i < 4; ++i) {
    strides[i] = i < missing || x.sizes[i - missing] == 1 ? 0 : x.strides[i - missing];
  }
}

BiasType bias_type_of(const TensorView& bias) {
  switch (bias.dtype) {
    case ElementType::fp16:
      return BiasType::fp16;
    case ElementType::bf16:
      return BiasType::bf16;
    case ElementType::boolean:
      return BiasType::boolean;
    default:
      return BiasType::fp32;
  }
}

// What forward and backward share.
AttentionParams params_of(const AttentionCall& call) {
  const AttentionOptions& options = call.options;
  AttentionParams params{};
  params.q = rows_of(call.q);
  params.k = rows_of(call.k);
  params.v = rows_of(call.v);
  params.cu_seqlens_q = data_of<int32_t>(call.cu_seqlens_q);
  params.cu_seqlens_k = data_of<int32_t>(call.cu_seqlens_k);
  params.seqused_k = data_of<int32_t>(call.seqused_k);
  params.leftpad_k = data_of<int32_t>(call.leftpad_k);
  params.block_table = data_of<int32_t>(call.block_table);
  if (call.paged()) {
    params.block_table_stride = call.block_table.stride(0);
    params.page_size = call.k.size(1);
  }
  params.batch = call.batch();
  params.heads = call.heads();
  params.heads_k = call.heads_k();
  params.head_dim = call.head_dim();
  params.head_dim_v = call.head_dim_v();
  params.seqlen_q = call.longest_q();
  params.seqlen_k = call.longest_k();
  if (call.packed()) params.total_q = call.q.size(0);
  if (call.cu_seqlens_k.given()) params.total_k = call.k.size(0);
  params.softmax_scale = options.softmax_scale;
  params.softcap = options.softcap;
  params.window_left = options.window_left;
  params.window_right = options.window_right;
  params.alibi_slopes = data_of<float>(call.alibi_slopes);
  if (call.alibi_slopes.rank == 2) params.alibi_batch_stride = call.alibi_slopes.stride(0);
  params.sinks = data_of<float>(call.sinks);
  if (call.bias.given()) {
    params.bias = call.bias.data;
    params.bias_type = bias_type_of(call.bias);
    copy_broadcast_strides(call.bias, params.bias_stride);
  }
  params.dropout_p = options.dropout_p;
  if (options.dropout_p > 0.0) params.rng_state = data_of<int64_t>(call.rng_state);
  return params;
}

AttentionParams backward_params_of(const AttentionCall& call, const BackwardCall& grad,
                                   const AttentionResults& results) {
  AttentionParams params = params_of(call);
  params.dout = rows_of(grad.dout);
  params.out = rows_of(grad.out);
  params.lse = statistics_of(grad.lse);
  if (grad.dlse.given()) params.dlse = statistics_of(grad.dlse);
  params.dq = rows_of(results.dq);
  params.dk = rows_of(results.dk);
  params.dv = rows_of(results.dv);
  if (results.dbias.given()) {
    params.dbias = static_cast<float*>(results.dbias.data);
    copy_broadcast_strides(results.dbias, params.dbias_stride);
  }
  if (results.dsinks.given()) params.dsinks = static_cast<float*>(results.dsinks.data);
  params.workspace = results.workspace;
  params.deterministic = grad.deterministic;
  return params;
}

// Rows of packed storage that belong to a sequence. Read on a CPU alone.
int64_t owned_rows(const TensorView& cu_seqlens) {
  return static_cast<const int32_t*>(cu_seqlens.data)[cu_seqlens.size(0) - 1];
}

// Zeros from row `begin` of the first dimension on; the last dimension is contiguous.
void clear_from(const TensorView& x, int64_t begin) {
  if (begin >= x.sizes[0] || x.numel() == 0) return;
  const int64_t width = bytes_of(x.dtype), last = x.rank - 1;
  const auto row_bytes = static_cast<size_t>(x.sizes[last] * width);
  const int64_t inner = x.rank == 4 ? x.sizes[2] : 1;
  for (int64_t i = begin; i < x.sizes[0]; ++i) {
    for (int64_t j = 0; j < x.sizes[1]; ++j) {
      for (int64_t k = 0; k < inner; ++k) {
        const int64_t at =
            i * x.strides[0] + j * x.strides[1] + (x.rank == 4 ? k * x.strides[2] : 0);
        std::memset(static_cast<char*>(x.data) + at * width, 0, row_bytes);
      }
    }
  }
}

// On a CPU: packed storage may hold rows after the last sequence, out 0 and lse +inf.
void clear_unowned_rows(const AttentionCall& call, const AttentionResults& results) {
  if (!call.packed()) return;
  const int64_t begin = owned_rows(call.cu_seqlens_q);
  clear_from(results.out, begin);
  auto* lse = static_cast<float*>(results.lse.data);
  for (int64_t head = 0; head < results.lse.size(0); ++head) {
    for (int64_t row = begin; row < results.lse.size(1); ++row) {
      lse[head * results.lse.stride(0) + row * results.lse.stride(1)] =
          std::numeric_limits<float>::infinity();
    }
  }
}

// On a CPU: the kernel writes the rows of keys that some sequence uses.
void clear_unused_keys(const AttentionCall& call, const TensorView& gradient) {
  if (call.seqused_k.given() || call.leftpad_k.given()) {
    clear_from(gradient, 0);
  } else if (call.cu_seqlens_k.given()) {
    clear_from(gradient, owned_rows(call.cu_seqlens_k));
  }
}

}  // namespace

void run_forward(const Instance& instance, const AttentionCall& call,
                 const AttentionResults& results, void* where) {
  if (instance.device == Device::cpu) clear_unowned_rows(call, results);
  AttentionParams params = params_of(call);
  params.out = rows_of(results.out);
  params.lse = statistics_of(results.lse);
  params.workspace = results.workspace;
  launch(instance, &params, where);
}

void run_backward(const Instance& instance, const AttentionCall& call, const BackwardCall& grad,
                  const AttentionResults& results, void* where) {
  if (instance.device == Device::cpu) {
    if (call.packed()) clear_from(results.dq, owned_rows(call.cu_seqlens_q));
    clear_unused_keys(call, results.dk);
    clear_unused_keys(call, results.dv);
  }
  AttentionParams params = backward_params_of(call, grad, results);
  launch(instance, &params, where);
}

int64_t workspace_bytes(const Instance& instance, const AttentionCall& call) {
  const AttentionParams params = params_of(call);
  return anyflash_attention_workspace(&instance, &params);
}

int64_t workspace_bytes(const Instance& instance, const AttentionCall& call,
                        const BackwardCall& grad, const AttentionResults& results) {
  const AttentionParams params = backward_params_of(call, grad, results);
  return anyflash_attention_workspace(&instance, &params);
}

}  // namespace anyflash
