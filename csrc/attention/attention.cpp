// _flash_attn_forward and _flash_attn_backward: prepare, run, return.
#include "attention/arguments.h"
#include "attention/run.h"
#include "operators.h"
#include "routes/routes.h"
#include "stable/aten.h"
#include "stable/check.h"
#include "stable/contiguous_rows.h"
#include "stable/grad_mode.h"
#include "stable/view.h"

namespace anyflash {
namespace {

[[noreturn]] void no_such_route(Route route) {
  raise_runtime_error(text("anyflash: attention cannot run on ", anyflash_route_name(route)));
}

Gradients run_backward(const Choice& choice, const AttentionArgs& args, const BackwardArgs& grad,
                       const AttentionCall& call, const BackwardCall& grad_call) {
  switch (choice.route) {
    case Route::kernel:
      return kernel::backward(*choice.instance, args, grad, call, grad_call);
    case Route::aten_cpu:
      return aten_cpu::backward(args, grad);
    case Route::aten_flash:
      return aten_flash::backward(args, grad);
    case Route::aten_efficient:
      return aten_efficient::backward(args, grad);
    case Route::aten_cudnn:
      return aten_cudnn::backward(args, grad);
    case Route::math:
      return math::backward(args, grad);
    default:
      no_such_route(choice.route);
  }
}

// Seed and offset for one call's dropout, from torch's default generator of q's device: (2,) int64.
Tensor draw_rng_state(const Tensor& q) {
  constexpr int64_t kEnd = int64_t{1} << 62;  // as the Python provider draws it
  return aten<Tensor>("aten::randint", "", kEnd, std::vector<int64_t>{2},
                      std::optional<ScalarType>(ScalarType::Long),
                      std::optional<torch::headeronly::Layout>(),
                      std::optional<torch::stable::Device>(q.device()), std::optional<bool>());
}

// What the call's dropout repeats from, as a tensor of its own: drawn where none is given, empty
// without dropout.
Tensor rng_state_of(const Tensor& q, const OptionalTensor& given, double dropout_p) {
  if (!(dropout_p > 0.0)) return empty({0}, q, ScalarType::Long);
  return given ? aten<Tensor>("aten::clone", "", *given, std::optional<int64_t>())
               : draw_rng_state(q);
}

// Checks and decides; `args` and `call` have normalised options afterwards.
Choice prepare(AttentionArgs& args, AttentionCall& call, const BackwardCall* grad, bool causal,
               int64_t backend) {
  const Caller from = caller(backend);
  Choice choice;
  check_status(anyflash_prepare_attention(&call, grad, causal, &from, &choice));
  static_cast<AttentionOptions&>(args) = call.options;
  return choice;
}

}  // namespace

AttentionCall views_of(const AttentionArgs& args, std::vector<Tensor>& host_copies) {
  AttentionCall call;
  call.q = view_of(args.q);
  call.k = view_of(args.k);
  call.v = view_of(args.v);
  call.cu_seqlens_q = view_with_values(args.cu_seqlens_q, host_copies);
  call.cu_seqlens_k = view_with_values(args.cu_seqlens_k, host_copies);
  call.seqused_k = view_with_values(args.seqused_k, host_copies);
  call.leftpad_k = view_with_values(args.leftpad_k, host_copies);
  call.block_table = view_with_values(args.block_table, host_copies);
  call.alibi_slopes = view_of(args.alibi_slopes);
  call.bias = view_of(args.bias);
  call.sinks = view_of(args.sinks);
  call.rng_state = view_of(args.rng_state);
  call.options = args;
  return call;
}

ForwardResult run_forward(const Choice& choice, const AttentionArgs& args,
                          const AttentionCall& call) {
  switch (choice.route) {
    case Route::kernel:
      return kernel::forward(*choice.instance, args, call);
    case Route::aten_cpu:
      return aten_cpu::forward(args);
    case Route::aten_flash:
      return aten_flash::forward(args);
    case Route::aten_efficient:
      return aten_efficient::forward(args);
    case Route::aten_cudnn:
      return aten_cudnn::forward(args);
    case Route::aten_sdpa:
      return aten_sdpa::forward(args);
    case Route::math:
      return math::forward(args);
    default:
      no_such_route(choice.route);
  }
}

std::tuple<Tensor, Tensor, Tensor> _flash_attn_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    const OptionalTensor& seqused_k, const OptionalTensor& leftpad_k,
    const OptionalTensor& block_table, const OptionalTensor& alibi_slopes,
    const OptionalTensor& bias, const OptionalTensor& sinks, const OptionalTensor& given_rng_state,
    double dropout_p, double softmax_scale, bool causal, int64_t window_left, int64_t window_right,
    double softcap, bool /*deterministic*/, bool return_lse, int64_t backend) {
  const NoGrad no_grad;
  AttentionArgs args{{}, q, k, v};
  args.cu_seqlens_q = cu_seqlens_q;
  args.cu_seqlens_k = cu_seqlens_k;
  args.seqused_k = seqused_k;
  args.leftpad_k = leftpad_k;
  args.block_table = block_table;
  args.alibi_slopes = alibi_slopes;
  args.bias = bias;
  args.sinks = sinks;
  const Tensor rng_state = rng_state_of(q, given_rng_state, dropout_p);
  args.rng_state = dropout_p > 0.0 ? OptionalTensor(rng_state) : std::nullopt;
  args.max_seqlen_q = max_seqlen_q;
  args.max_seqlen_k = max_seqlen_k;
  args.dropout_p = dropout_p;
  args.softmax_scale = softmax_scale;
  args.softcap = softcap;
  args.window_left = window_left;
  args.window_right = window_right;
  args.return_lse = return_lse;
  std::vector<Tensor> host_copies;
  AttentionCall call = views_of(args, host_copies);
  const Choice choice = prepare(args, call, nullptr, causal, backend);
  const auto [out, softmax_lse] = run_forward(choice, args, call);
  return {out, softmax_lse, rng_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> _flash_attn_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const OptionalTensor& dlse, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    const OptionalTensor& seqused_k, const OptionalTensor& leftpad_k,
    const OptionalTensor& alibi_slopes, const OptionalTensor& bias, const OptionalTensor& sinks,
    const OptionalTensor& rng_state, double dropout_p, double softmax_scale, bool causal,
    int64_t window_left, int64_t window_right, double softcap, bool deterministic,
    bool bias_requires_grad, bool sinks_requires_grad, int64_t backend) {
  const NoGrad no_grad;
  AttentionArgs args{{}, q, k, v};
  args.cu_seqlens_q = cu_seqlens_q;
  args.cu_seqlens_k = cu_seqlens_k;
  args.seqused_k = seqused_k;
  args.leftpad_k = leftpad_k;
  args.alibi_slopes = alibi_slopes;
  args.bias = bias;
  args.sinks = sinks;
  args.rng_state = rng_state;
  args.max_seqlen_q = max_seqlen_q;
  args.max_seqlen_k = max_seqlen_k;
  args.dropout_p = dropout_p;
  args.softmax_scale = softmax_scale;
  args.softcap = softcap;
  args.window_left = window_left;
  args.window_right = window_right;
  // What autograd hands over may be expanded or transposed; the routes read rows of contiguous
  // elements.
  const BackwardArgs grad{contiguous_rows(dout), contiguous_rows(out), lse, dlse, deterministic,
                          bias_requires_grad,    sinks_requires_grad};
  std::vector<Tensor> host_copies;
  AttentionCall call = views_of(args, host_copies);
  const BackwardCall grad_call{view_of(grad.dout), view_of(grad.out), view_of(grad.lse),
                               view_of(grad.dlse), deterministic,     bias_requires_grad,
                               sinks_requires_grad};
  const Choice choice = prepare(args, call, &grad_call, causal, backend);
  Gradients result = run_backward(choice, args, grad, call, grad_call);
  const auto or_empty = [&q](OptionalTensor& tensor) {
    return tensor ? *tensor : empty({0}, q, q.scalar_type());
  };
  return {result.dq, result.dk, result.dv, or_empty(result.dbias), or_empty(result.dsinks)};
}

}  // namespace anyflash
