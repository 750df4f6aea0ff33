#include "attention_params.h"

#include "layout.h"

namespace anyflash {
namespace {

template <class T>
const T* data_of(const OptionalTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

BiasType bias_type_of(const Tensor& bias) {
  switch (bias.scalar_type()) {
    case ScalarType::Half:
      return BiasType::fp16;
    case ScalarType::BFloat16:
      return BiasType::bf16;
    case ScalarType::Bool:
      return BiasType::boolean;
    default:
      return BiasType::fp32;
  }
}

}  // namespace

Rows rows_of(const Tensor& x) {
  const Sizes strides = x.strides();
  if (x.dim() == 3) return {x.data_ptr(), 0, strides[0], strides[1]};
  return {x.data_ptr(), strides[0], strides[1], strides[2]};
}

RowStatistics statistics_of(const Tensor& x) {
  const Sizes strides = x.strides();
  float* data = static_cast<float*>(x.data_ptr());
  if (x.dim() == 2) return {data, 0, strides[0]};
  return {data, strides[0], strides[1]};
}

void copy_broadcast_strides(const Tensor& x, int64_t* strides) {
  const int64_t missing = 4 - x.dim();
  for (int64_t i = 0; i < 4; ++i) {
    strides[i] = i < missing || x.size(i - missing) == 1 ? 0 : x.stride(i - missing);
  }
}

AttentionInputs::AttentionInputs(const AttentionArgs& args, const Tensor& q, const Tensor& k,
                                 const Tensor& v)
    : q_(q), k_(k), v_(v) {
  params.q = rows_of(q_);
  params.k = rows_of(k_);
  params.v = rows_of(v_);
  params.batch = args.batch();
  params.heads = args.heads();
  params.heads_k = args.heads_k();
  params.head_dim = q_.size(q_.dim() - 1);
  params.head_dim_v = v_.size(v_.dim() - 1);
  set_sequences(args);
  set_scores(args);
  if (args.bias) set_bias(args);
}

void AttentionInputs::set_sequences(const AttentionArgs& args) {
  cu_seqlens_q_ = contiguous_last_dim(args.cu_seqlens_q);
  cu_seqlens_k_ = contiguous_last_dim(args.cu_seqlens_k);
  seqused_k_ = contiguous_last_dim(args.seqused_k);
  leftpad_k_ = contiguous_last_dim(args.leftpad_k);
  block_table_ = contiguous_last_dim(args.block_table);
  params.cu_seqlens_q = data_of<int32_t>(cu_seqlens_q_);
  params.cu_seqlens_k = data_of<int32_t>(cu_seqlens_k_);
  params.seqused_k = data_of<int32_t>(seqused_k_);
  params.leftpad_k = data_of<int32_t>(leftpad_k_);
  params.block_table = data_of<int32_t>(block_table_);
  if (block_table_) {
    params.block_table_stride = block_table_->stride(0);
    params.page_size = args.k.size(1);
  }
  params.seqlen_q = args.longest_q();
  params.seqlen_k = args.longest_k();
}

void AttentionInputs::set_scores(const AttentionArgs& args) {
  params.softmax_scale = args.softmax_scale;
  params.softcap = args.softcap;
  params.window_left = args.window_left;
  params.window_right = args.window_right;
  alibi_slopes_ = contiguous_last_dim(args.alibi_slopes);
  params.alibi_slopes = data_of<float>(alibi_slopes_);
  if (alibi_slopes_ && alibi_slopes_->dim() == 2) {
    params.alibi_batch_stride = alibi_slopes_->stride(0);
  }
  if (args.sinks) sinks_ = contiguous(to_dtype(*args.sinks, ScalarType::Float));
  params.sinks = data_of<float>(sinks_);
  params.dropout_p = args.dropout_p;
  if (args.dropout_p > 0.0) params.rng_state = data_of<int64_t>(args.rng_state);
}

void AttentionInputs::set_bias(const AttentionArgs& args) {
  const bool is_double = args.bias->scalar_type() == ScalarType::Double;
  bias_ = is_double ? to_dtype(*args.bias, ScalarType::Float) : *args.bias;
  params.bias = bias_->const_data_ptr();
  params.bias_type = bias_type_of(*bias_);
  copy_broadcast_strides(*bias_, params.bias_stride);
}

Tensor KernelOutput::finish() const {
  if (written_.get() != promised_.get()) {
    const int64_t last = promised_.dim() - 1;
    copy_(promised_, narrow(written_, last, 0, promised_.size(last)));
  }
  return promised_;
}

}  // namespace anyflash
