// Attention as the decision sees it: its numbers normalised, its features.
#include "core/describe.h"

#include <algorithm>
#include <stdexcept>

#include "core/attention.h"
#include "core/device.h"
#include "core/environment.h"
#include "core/kvcache.h"
#include "core/text.h"

namespace anyflash {
namespace {

Order checked_order(int64_t backend) {
  if (backend == 0) return environment().order;
  for (Order rest = backend; rest != 0; rest = rest_of(rest)) {
    const auto digit = static_cast<int32_t>(first_back_end(rest));
    if (backend < 0 || digit == 0 || digit >= kNumBackEnds) {
      throw std::invalid_argument(text("backend: expected an order of back ends 1 to ",
                                       kNumBackEnds - 1, " in hexadecimal digits, got ", backend));
    }
  }
  return backend;
}

Features features_of(const AttentionCall& call) {
  Features features = 0;
  const auto add = [&features](bool present, Features feature) {
    if (present) features |= feature;
  };
  const AttentionOptions& options = call.options;
  add(call.packed(), Feature::packed);
  add(call.paged(), Feature::paged);
  add(call.seqused_k.given(), Feature::seqused_k);
  add(call.leftpad_k.given(), Feature::leftpad_k);
  add(options.window_right == 0, Feature::causal);
  add(options.window_left >= 0 || options.window_right > 0, Feature::window);
  add(options.return_lse, Feature::lse);
  add(options.softcap > 0.0, Feature::softcap);
  add(call.alibi_slopes.given(), Feature::alibi);
  add(call.bias.given(), Feature::bias);
  add(call.sinks.given(), Feature::sinks);
  add(options.dropout_p > 0.0, Feature::dropout);
  add(call.heads_k() != call.heads(), Feature::gqa);
  add(call.head_dim_v() != call.head_dim(), Feature::unequal_head_dims);
  return features;
}

// Whether a number of the bias belongs to many scores.
bool broadcasts(const TensorView& bias) {
  if (bias.rank < 4) return true;
  return std::any_of(bias.sizes, bias.sizes + 4, [](int64_t size) { return size == 1; });
}

Problem describe_attention(const AttentionCall& call, Direction direction, const Caller& caller) {
  Problem problem = describe(call.q, Family::attention, direction, caller);
  problem.head_dim = static_cast<int32_t>(call.head_dim());
  problem.head_dim_v = static_cast<int32_t>(call.head_dim_v());
  problem.features = features_of(call);
  return problem;
}

}  // namespace

Problem describe_machine(Device device, int32_t device_index) {
  Problem problem;
  problem.device = device;
  if (device == Device::cuda) {
    problem.sm = device_sm(device_index);
    problem.driver = driver_version();
  }
  if (device == Device::cpu) {
    const AllowedIsa allowed = cpu_isa();
    problem.sm = allowed.isa;
    problem.isa_lowered = allowed.lowered;
  }
  return problem;
}

Problem describe(const TensorView& x, Family family, Direction direction, const Caller& caller) {
  Problem problem = describe_machine(x.device, x.device_index);
  problem.family = family;
  problem.direction = direction;
  problem.dtype = static_cast<Dtype>(x.dtype);
  problem.torch_version = caller.torch_version;
  problem.order = checked_order(caller.backend);
  problem.explicit_order = problem.order != kDefaultOrder;
  return problem;
}

void normalise(AttentionCall& call, bool causal) {
  AttentionOptions& options = call.options;
  // Ranks are checked only later: what has too few dimensions keeps what it came with.
  if (!call.packed() && call.q.rank == 4) options.max_seqlen_q = call.q.size(1);
  if (call.k.rank == 4) {
    if (!call.paged()) {
      options.max_seqlen_k = call.k.size(1);
    } else if (call.block_table.rank == 2) {
      options.max_seqlen_k = call.block_table.size(1) * call.k.size(1);
    }
  }
  const int64_t longest = options.max_seqlen_k;
  if (options.window_left >= longest || options.window_left < 0) options.window_left = -1;
  if (options.window_right >= longest || options.window_right < 0) options.window_right = -1;
  if (causal) options.window_right = 0;
}

Problem describe_forward(const AttentionCall& call, const Caller& caller) {
  return describe_attention(call, Direction::forward, caller);
}

Problem describe_backward(const AttentionCall& call, const BackwardCall& grad,
                          const Caller& caller) {
  Problem problem = describe_attention(call, Direction::backward, caller);
  problem.features |= Feature::lse;  // it is given
  if (grad.dlse.given()) problem.features |= Feature::lse_grad;
  if (grad.bias_requires_grad) problem.features |= Feature::bias_grad;
  if (grad.deterministic) problem.features |= Feature::deterministic;
  if (grad.deterministic && grad.bias_requires_grad && broadcasts(call.bias)) {
    problem.features |= Feature::deterministic_bias_grad;
  }
  return problem;
}

Problem describe_append(const KVCacheCall& call, const Caller& caller) {
  Problem problem = describe(call.k_cache, Family::kvcache_append, Direction::forward, caller);
  problem.head_dim = static_cast<int32_t>(call.k_cache.size(3));
  problem.head_dim_v = static_cast<int32_t>(call.v_cache.size(3));
  return problem;
}

}  // namespace anyflash
