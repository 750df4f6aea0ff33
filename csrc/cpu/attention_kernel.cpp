#include "cpu/attention_kernel.h"

#include <algorithm>

#include "fallback/promised.h"
#include "fallback/runs.h"
#include "launch.h"
#include "layout.h"
#include "stable/aten.h"

namespace anyflash::cpu_kernel {
namespace {

OptionalTensor contiguous_last_dim(const OptionalTensor& x) {
  return x ? OptionalTensor(anyflash::contiguous_last_dim(*x)) : x;
}

template <class T>
const T* data_of(const OptionalTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

Rows rows_of(const Tensor& x) {
  const Sizes strides = x.strides();
  void* data = x.data_ptr();
  if (x.dim() == 3) return {data, 0, strides[0], strides[1]};
  return {data, strides[0], strides[1], strides[2]};
}

// (batch, heads, rows) or, packed, (heads, rows).
RowStatistics statistics_of(const Tensor& x) {
  const Sizes strides = x.strides();
  float* data = static_cast<float*>(x.data_ptr());
  if (x.dim() == 2) return {data, 0, strides[0]};
  return {data, strides[0], strides[1]};
}

// Keys of each sequence of a paged cache whose lengths come as cu_seqlens_k.
Tensor lengths_of(const Tensor& cu_seqlens_k, const OptionalTensor& seqused_k) {
  const int64_t batch = cu_seqlens_k.size(0) - 1;
  const auto* begins = static_cast<const int32_t*>(cu_seqlens_k.const_data_ptr());
  const auto* used = data_of<int32_t>(seqused_k);
  const Tensor lengths = empty({batch}, cu_seqlens_k, ScalarType::Int);
  auto* length = static_cast<int32_t*>(lengths.data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t stored = begins[b + 1] - begins[b];
    length[b] = used ? std::min(stored, used[b]) : stored;
  }
  return lengths;
}

// Strides that let a dimension of 1 broadcast.
void copy_broadcast_strides(const Tensor& x, int64_t* strides) {
  const int64_t missing = 4 - x.dim();
  for (int64_t i = 0; i < 4; ++i) {
    strides[i] = i < missing || x.size(i - missing) == 1 ? 0 : x.stride(i - missing);
  }
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

// The parameters that forward and backward share, and what had to be converted for them.
class Inputs {
 public:
  explicit Inputs(const AttentionArgs& args)
      : q_(anyflash::contiguous_last_dim(args.q)),
        k_(anyflash::contiguous_last_dim(args.k)),
        v_(anyflash::contiguous_last_dim(args.v)),
        cu_seqlens_q_(contiguous_last_dim(args.cu_seqlens_q)),
        cu_seqlens_k_(contiguous_last_dim(args.cu_seqlens_k)),
        seqused_k_(contiguous_last_dim(args.seqused_k)),
        leftpad_k_(contiguous_last_dim(args.leftpad_k)),
        block_table_(contiguous_last_dim(args.block_table)),
        alibi_slopes_(contiguous_last_dim(args.alibi_slopes)),
        bias_(args.bias) {
    if (args.sinks) sinks_ = contiguous(to_dtype(*args.sinks, ScalarType::Float));
    if (bias_ && bias_->scalar_type() == ScalarType::Double) {
      bias_ = to_dtype(*bias_, ScalarType::Float);
    }
    if (args.paged() && args.cu_seqlens_k) {
      seqused_k_ = lengths_of(*cu_seqlens_k_, seqused_k_);
      cu_seqlens_k_.reset();
    }
    set_tensors(args);
    set_bias();
    set_numbers(args);
  }

  AttentionParams params{};

 private:
  void set_tensors(const AttentionArgs& args) {
    params.q = rows_of(q_);
    params.k = rows_of(k_);
    params.v = rows_of(v_);
    params.cu_seqlens_q = data_of<int32_t>(cu_seqlens_q_);
    params.cu_seqlens_k = data_of<int32_t>(cu_seqlens_k_);
    params.seqused_k = data_of<int32_t>(seqused_k_);
    params.leftpad_k = data_of<int32_t>(leftpad_k_);
    params.block_table = data_of<int32_t>(block_table_);
    if (block_table_) {
      params.block_table_stride = block_table_->stride(0);
      params.page_size = args.k.size(1);
    }
    params.alibi_slopes = data_of<float>(alibi_slopes_);
    if (alibi_slopes_ && alibi_slopes_->dim() == 2) {
      params.alibi_batch_stride = alibi_slopes_->stride(0);
    }
    params.sinks = data_of<float>(sinks_);
  }

  void set_bias() {
    if (!bias_) return;
    params.bias = bias_->const_data_ptr();
    params.bias_type = bias_type_of(*bias_);
    copy_broadcast_strides(*bias_, params.bias_stride);
  }

  void set_numbers(const AttentionArgs& args) {
    params.batch = args.batch();
    params.heads = args.heads();
    params.heads_k = args.heads_k();
    params.head_dim = args.head_dim();
    params.head_dim_v = args.head_dim_v();
    params.seqlen_q = args.max_seqlen_q;
    params.seqlen_k = args.max_seqlen_k;
    params.softmax_scale = args.softmax_scale;
    params.softcap = args.softcap;
    params.window_left = args.window_left;
    params.window_right = args.window_right;
    params.dropout_p = args.dropout_p;
    if (args.dropout_p > 0.0) {
      const auto* rng_state = static_cast<const int64_t*>(args.rng_state->const_data_ptr());
      params.seed = static_cast<uint64_t>(rng_state[0]);
      params.offset = static_cast<uint32_t>(rng_state[1]);
    }
  }

  Tensor q_, k_, v_;
  OptionalTensor cu_seqlens_q_, cu_seqlens_k_, seqused_k_, leftpad_k_, block_table_;
  OptionalTensor alibi_slopes_, bias_, sinks_;
};

// A result in the layout that the operators promise, with rows that the kernel can write.
class Output {
 public:
  explicit Output(const Tensor& promised)
      : promised_(promised), written_(anyflash::contiguous_last_dim(promised)) {}
  const Tensor& written() const { return written_; }
  Tensor finish() const {
    if (written_.get() != promised_.get()) copy_(promised_, written_);
    return promised_;
  }

 private:
  Tensor promised_, written_;
};

// Rows of packed storage that belong to a sequence.
int64_t owned_rows(const OptionalTensor& cu_seqlens) {
  return data_of<int32_t>(cu_seqlens)[cu_seqlens->size(0) - 1];
}

void clear_from(const Tensor& x, int64_t row) {
  if (row < x.size(0)) fill_(narrow(x, 0, row, x.size(0) - row), 0);
}

// The kernel writes the rows of keys that some sequence uses.
void clear_unused_keys(const AttentionArgs& args, const Tensor& gradient) {
  if (args.seqused_k || args.leftpad_k) {
    fill_(gradient, 0);
  } else if (args.cu_seqlens_k) {
    clear_from(gradient, owned_rows(args.cu_seqlens_k));
  }
}

}  // namespace

ForwardResult forward(const Instance& instance, const AttentionArgs& args) {
  Inputs inputs(args);
  const Output out(new_out(args));
  const Tensor lse = new_lse(args);
  clear_unowned_rows(args, out.written(), lse);
  inputs.params.out = rows_of(out.written());
  inputs.params.lse = statistics_of(lse);
  launch(instance, &inputs.params, args.q);
  return {out.finish(), lse};
}

Gradients backward(const Instance& instance, const AttentionArgs& args, const BackwardArgs& grad) {
  Inputs inputs(args);
  AttentionParams& params = inputs.params;
  const Tensor out = anyflash::contiguous_last_dim(grad.out);
  const Tensor dout = anyflash::contiguous_last_dim(grad.dout);
  const Tensor lse = anyflash::contiguous_last_dim(grad.lse);
  OptionalTensor dlse = contiguous_last_dim(grad.dlse);
  if (dlse) dlse = to_dtype(*dlse, ScalarType::Float);
  params.out = rows_of(out);
  params.dout = rows_of(dout);
  params.lse = statistics_of(lse);
  if (dlse) params.dlse = statistics_of(*dlse);

  const Output dq(empty_like(args.q)), dk(empty_like(args.k)), dv(empty_like(args.v));
  if (args.packed()) clear_from(dq.written(), owned_rows(args.cu_seqlens_q));
  clear_unused_keys(args, dk.written());
  clear_unused_keys(args, dv.written());
  params.dq = rows_of(dq.written());
  params.dk = rows_of(dk.written());
  params.dv = rows_of(dv.written());

  OptionalTensor dbias, dsinks;
  if (grad.bias_requires_grad) {
    dbias = full(args.bias->sizes(), 0, args.q, ScalarType::Float);
    params.dbias = static_cast<float*>(dbias->data_ptr());
    copy_broadcast_strides(*dbias, params.dbias_stride);
  }
  if (grad.sinks_requires_grad) {
    dsinks = full(args.sinks->sizes(), 0, args.q, ScalarType::Float);
    params.dsinks = static_cast<float*>(dsinks->data_ptr());
  }
  launch(instance, &params, args.q);
  Gradients result{dq.finish(), dk.finish(), dv.finish(), std::nullopt, std::nullopt};
  if (dbias) result.dbias = to_dtype(*dbias, args.bias->scalar_type());
  if (dsinks) result.dsinks = to_dtype(*dsinks, args.sinks->scalar_type());
  return result;
}

}  // namespace anyflash::cpu_kernel
