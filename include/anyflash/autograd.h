// The operators as anyflash/attention.h calls them: with a derivative, or a refusal of it.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/version.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#if TORCH_VERSION_MAJOR < 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 10)
#error "anyflash/attention.h needs LibTorch 2.10 or newer"
#endif

// Of libanyflash_ops.so: "", or why it did not register its operators. Weak: a program that opens
// the library later, or leaves that to Python, does not link it.
extern "C" __attribute__((weak)) const char* anyflash_register_error(void);

namespace anyflash {

using OptionalTensor = std::optional<at::Tensor>;

namespace detail {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Forward = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k,
    const OptionalTensor& seqused_k, const OptionalTensor& leftpad_k,
    const OptionalTensor& block_table, const OptionalTensor& alibi_slopes,
    const OptionalTensor& bias, const OptionalTensor& sinks, const OptionalTensor& rng_state,
    double dropout_p, double softmax_scale, bool causal, c10::SymInt window_size_left,
    c10::SymInt window_size_right, double softcap, bool deterministic, bool return_lse,
    int64_t backend);

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& softmax_lse, const OptionalTensor& dsoftmax_lse,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    c10::SymInt max_seqlen_q, c10::SymInt max_seqlen_k, const OptionalTensor& seqused_k,
    const OptionalTensor& leftpad_k, const OptionalTensor& alibi_slopes, const OptionalTensor& bias,
    const OptionalTensor& sinks, const OptionalTensor& rng_state, double dropout_p,
    double softmax_scale, bool causal, c10::SymInt window_size_left, c10::SymInt window_size_right,
    double softcap, bool deterministic, bool bias_requires_grad, bool sinks_requires_grad,
    int64_t backend);

using KVCache = std::tuple<Tensor, Tensor>(
    const Tensor& q, Tensor& k_cache, Tensor& v_cache, const OptionalTensor& k,
    const OptionalTensor& v, const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin,
    const OptionalTensor& cache_seqlens, const OptionalTensor& cache_batch_idx,
    const OptionalTensor& cache_leftpad, const OptionalTensor& block_table,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, double softmax_scale,
    bool causal, c10::SymInt window_size_left, c10::SymInt window_size_right, double softcap,
    bool rotary_interleaved, bool return_lse, int64_t backend);

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  const auto found = c10::Dispatcher::singleton().findSchema({name, ""});
  if (!found) {
    const std::string error = anyflash_register_error == nullptr ? "" : anyflash_register_error();
    TORCH_CHECK(false, name, ": no such operator, because ",
                error.empty() ? "libanyflash_ops.so has not been loaded; link anyflash::ops or "
                                "open the file that `python -m anyflash --library` names"
                              : error);
  }
  return found->typed<Signature>();
}

// An undefined tensor is none.
inline OptionalTensor given(const OptionalTensor& x) {
  return x && x->defined() ? x : std::nullopt;
}

// Whether autograd is to record a call.
inline bool needs_autograd(const Tensor& x) {
  if (!x.defined()) return false;
  TORCH_CHECK(!x._fw_grad(/*level=*/0).defined(),
              "anyflash has no forward-mode derivative, but an argument has a tangent");
  return at::GradMode::is_enabled() && x.requires_grad();
}

inline bool needs_autograd(const OptionalTensor& x) { return x && needs_autograd(*x); }

// The first `count` tensors as they are, bound to all of them: RuntimeError(why) for whoever
// differentiates them.
struct Refuse : torch::autograd::Function<Refuse> {
  static variable_list forward(AutogradContext* context, at::TensorList tensors, int64_t count,
                               const std::string& why) {
    context->saved_data["why"] = why;
    return tensors.slice(0, count).vec();
  }

  static variable_list backward(AutogradContext* context, const variable_list&) {
    TORCH_CHECK(false, context->saved_data["why"].toStringRef());
  }
};

inline variable_list refuse(const variable_list& results, const variable_list& causes,
                            const std::string& why) {
  variable_list tensors = results;
  for (const Tensor& x : causes) {
    if (x.defined()) tensors.push_back(x);
  }
  return Refuse::apply(at::TensorList(tensors), static_cast<int64_t>(results.size()), why);
}

// A call of the operator: what of its arguments has no derivative.
struct Call {
  OptionalTensor cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, rng_state;
  int64_t max_seqlen_q = 0, max_seqlen_k = 0;
  double dropout_p, softmax_scale;
  bool causal;
  std::array<int64_t, 2> window_size;
  double softcap;
  bool deterministic;
  bool return_lse;
};

inline std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const OptionalTensor& alibi_slopes,
                                                  const OptionalTensor& bias,
                                                  const OptionalTensor& sinks, const Call& call) {
  static const auto attention = find_operator<Forward>("anyflash::_flash_attn_forward");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return attention.call(q, k, v, call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q,
                        call.max_seqlen_k, call.seqused_k, call.leftpad_k, call.block_table,
                        alibi_slopes, bias, sinks, call.rng_state, call.dropout_p,
                        call.softmax_scale, call.causal, call.window_size[0], call.window_size[1],
                        call.softcap, call.deterministic, call.return_lse, /*backend=*/0);
}

// The order of Attention's arguments, of which the first kInputs may ask for a gradient, and of the
// tensors that it saves.
enum Saved : size_t {
  kQ,
  kK,
  kV,
  kAlibiSlopes,
  kBias,
  kSinks,
  kInputs,
  kOut = kInputs,
  kLse,
  kRngState,
  kCuSeqlensQ,
  kCuSeqlensK,
  kSequsedK,
  kLeftpadK
};

struct Attention : torch::autograd::Function<Attention> {
  // Returns out and the log-sum-exp.
  static variable_list forward(AutogradContext* context, const Tensor& q, const Tensor& k,
                               const Tensor& v, const OptionalTensor& alibi_slopes,
                               const OptionalTensor& bias, const OptionalTensor& sinks,
                               const Call& call) {
    const bool paged = call.block_table.has_value();
    const auto [out, lse, rng_state] = detail::forward(q, k, v, alibi_slopes, bias, sinks, call);
    const auto tensor = [](const OptionalTensor& x) { return x.value_or(Tensor()); };
    context->save_for_backward({q, k, v, tensor(alibi_slopes), tensor(bias), tensor(sinks), out,
                                lse, rng_state.numel() > 0 ? rng_state : Tensor(),
                                tensor(call.cu_seqlens_q), tensor(call.cu_seqlens_k),
                                tensor(call.seqused_k), tensor(call.leftpad_k)});
    context->set_materialize_grads(false);
    auto& data = context->saved_data;
    data["paged"] = paged;
    data["max_seqlen_q"] = call.max_seqlen_q;
    data["max_seqlen_k"] = call.max_seqlen_k;
    data["dropout_p"] = call.dropout_p;
    data["softmax_scale"] = call.softmax_scale;
    data["causal"] = call.causal;
    data["window_left"] = call.window_size[0];
    data["window_right"] = call.window_size[1];
    data["softcap"] = call.softcap;
    data["deterministic"] = call.deterministic;
    return {out, lse};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    TORCH_CHECK(!context->saved_data["paged"].toBool(),
                "block_table: paged attention has no gradient, but a backward went through its "
                "result; expected a call under torch::NoGradGuard, or keys and values without "
                "pages");
    const variable_list saved = context->get_saved_variables();
    std::array<bool, kInputs> asked{};
    for (size_t i = 0, edge = 0; i < kInputs; ++i) {  // an edge for each tensor that is there
      if (saved[i].defined()) asked[i] = context->needs_input_grad(edge++);
    }
    TORCH_CHECK(!asked[kAlibiSlopes],
                "alibi_slopes: attention has no gradient of the slopes, but they require one; "
                "expected alibi_slopes.detach(), or bias = slopes * distances, which has a "
                "gradient");
    variable_list results = differentiate(context->saved_data, saved, gradients, asked);
    if (at::GradMode::is_enabled()) {
      variable_list causes = gradients;
      causes.insert(causes.end(), saved.begin(), saved.end());
      results = refuse(results, causes,
                       "anyflash has no second derivative, but a gradient was differentiated");
    }
    const auto [dq, dk, dv, dbias, dsinks] =
        std::tie(results[0], results[1], results[2], results[3], results[4]);
    return {dq,
            dk,
            dv,
            Tensor(),
            asked[kBias] ? dbias : Tensor(),
            asked[kSinks] ? dsinks : Tensor(),
            Tensor()};
  }

 private:
  // dq, dk, dv, dbias, dsinks.
  static variable_list differentiate(ska::flat_hash_map<std::string, at::IValue>& data,
                                     const variable_list& saved, const variable_list& gradients,
                                     const std::array<bool, kInputs>& asked) {
    static const auto derivative = find_operator<Backward>("anyflash::_flash_attn_backward");
    const at::NoGradGuard no_grad;
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Tensor dout = gradients[0].defined() ? gradients[0] : at::zeros_like(saved[kOut]);
    auto [dq, dk, dv, dbias, dsinks] = derivative.call(
        dout, saved[kQ], saved[kK], saved[kV], saved[kOut], saved[kLse], given(gradients[1]),
        given(saved[kCuSeqlensQ]), given(saved[kCuSeqlensK]), data["max_seqlen_q"].toInt(),
        data["max_seqlen_k"].toInt(), given(saved[kSequsedK]), given(saved[kLeftpadK]),
        given(saved[kAlibiSlopes]), given(saved[kBias]), given(saved[kSinks]),
        given(saved[kRngState]), data["dropout_p"].toDouble(), data["softmax_scale"].toDouble(),
        data["causal"].toBool(), data["window_left"].toInt(), data["window_right"].toInt(),
        data["softcap"].toDouble(), data["deterministic"].toBool(), asked[kBias], asked[kSinks],
        /*backend=*/0);
    return {dq, dk, dv, dbias, dsinks};
  }
};

}  // namespace detail
}  // namespace anyflash
