#include "describe.h"

#include <stdexcept>

#include "cuda/device.h"
#include "environment.h"
#include "stable/aten.h"
#include "stable/check.h"
#include "stable/dtypes.h"

namespace anyflash {
namespace {

Dtype kernel_dtype(const Tensor& tensor) {
  const int32_t code = dtype_of(tensor);
  const DTypes& types = dtypes();
  if (code == types.fp32) return Dtype::fp32;
  if (code == types.bf16) return Dtype::bf16;
  if (code == types.fp16) return Dtype::fp16;
  return Dtype::fp64;
}

Chain checked_chain(int64_t backend) {
  if (backend == 0) return environment().chain;
  for (Chain rest = backend; rest != 0; rest = rest_of(rest)) {
    const auto digit = static_cast<int32_t>(first_back_end(rest));
    if (backend < 0 || digit == 0 || digit >= kNumBackEnds) {
      throw std::invalid_argument(text("backend: expected a chain of back ends 1 to ",
                                       kNumBackEnds - 1, " in hexadecimal digits, got ", backend));
    }
  }
  return backend;
}

Problem describe(const Tensor& x, Family family, Direction direction, int64_t backend) {
  Problem problem;
  problem.family = family;
  problem.direction = direction;
  problem.device = x.is_cuda() ? Device::cuda : Device::cpu;
  problem.sm = problem.device == Device::cuda ? cuda::device_sm(x.get_device_index()) : cpu_isa();
  problem.dtype = kernel_dtype(x);
  problem.torch_version = torch_version();
  problem.chain = checked_chain(backend);
  problem.explicit_chain = problem.chain != kDefaultChain;
  return problem;
}

Features features_of(const AttentionArgs& args) {
  Features features = 0;
  const auto add = [&features](bool present, Features feature) {
    if (present) features |= feature;
  };
  const bool windowed = args.window_left >= 0 || args.window_right > 0;
  add(args.packed(), Feature::packed);
  add(args.paged(), Feature::paged);
  add(args.seqused_k.has_value(), Feature::seqused_k);
  add(args.leftpad_k.has_value(), Feature::leftpad_k);
  add(args.window_right == 0, Feature::causal);
  add(windowed, Feature::window);
  add(args.softcap > 0.0, Feature::softcap);
  add(args.alibi_slopes.has_value(), Feature::alibi);
  add(args.bias.has_value(), Feature::bias);
  add(args.sinks.has_value(), Feature::sinks);
  add(args.dropout_p > 0.0, Feature::dropout);
  add(args.heads_k() != args.heads(), Feature::gqa);
  add(args.head_dim_v() != args.head_dim(), Feature::unequal_head_dims);
  return features;
}

Problem describe_attention(const AttentionArgs& args, Direction direction, int64_t backend) {
  Problem problem = describe(args.q, Family::attention, direction, backend);
  problem.head_dim = static_cast<int32_t>(args.head_dim());
  problem.head_dim_v = static_cast<int32_t>(args.head_dim_v());
  problem.features = features_of(args);
  return problem;
}

}  // namespace

void normalise(AttentionArgs& args, bool causal) {
  // Ranks are checked only later: what has too few dimensions keeps what it came with.
  if (!args.packed() && args.q.dim() == 4) args.max_seqlen_q = args.q.size(1);
  if (args.k.dim() == 4) {
    if (!args.paged()) {
      args.max_seqlen_k = args.k.size(1);
    } else if (args.block_table->dim() == 2) {
      args.max_seqlen_k = args.block_table->size(1) * args.k.size(1);
    }
  }
  if (args.window_left >= args.max_seqlen_k || args.window_left < 0) args.window_left = -1;
  if (args.window_right >= args.max_seqlen_k || args.window_right < 0) args.window_right = -1;
  if (causal) args.window_right = 0;
}

Problem describe_forward(const AttentionArgs& args, int64_t backend) {
  return describe_attention(args, Direction::forward, backend);
}

Problem describe_backward(const AttentionArgs& args, const BackwardArgs& grad, int64_t backend) {
  Problem problem = describe_attention(args, Direction::backward, backend);
  if (grad.dlse) problem.features |= Feature::lse_grad;
  if (grad.bias_requires_grad) problem.features |= Feature::bias_grad;
  if (grad.deterministic) problem.features |= Feature::deterministic;
  return problem;
}

Problem describe_bias_activation(const Tensor& x, Direction direction, int64_t backend) {
  return describe(x, Family::bias_activation, direction, backend);
}

Problem describe_rowwise(const Tensor& x, Family family, Direction direction) {
  return describe(x, family, direction, static_cast<Chain>(BackEnd::kernel));
}

Problem describe_kvcache_append(const Tensor& k_cache, const Tensor& v_cache, int64_t backend) {
  Problem problem = describe(k_cache, Family::kvcache_append, Direction::forward, backend);
  problem.head_dim = static_cast<int32_t>(k_cache.size(3));
  problem.head_dim_v = static_cast<int32_t>(v_cache.size(3));
  return problem;
}

}  // namespace anyflash
