// cuDNN's attention in PyTorch: dense, without a mask.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include "attention/results.h"
#include "core/late_symbol.h"
#include "routes/routes.h"

namespace anyflash::aten_cudnn {
namespace {

Tensor by_head(const Tensor& x) { return transpose(x, 1, 2); }

// Nothing to compute, or a scale that does not keep the order of the scores.
bool is_for_math(const AttentionArgs& args) { return args.empty() || args.softmax_scale <= 0; }

// out and the log-sum-exp. Not through the dispatcher: its results are of several types (aten.h).
std::pair<Tensor, Tensor> call_forward(const AttentionArgs& args) {
  static LateSymbol<decltype(aoti_torch_cuda__scaled_dot_product_cudnn_attention)> attend(
      "aoti_torch_cuda__scaled_dot_product_cudnn_attention", "libtorch_cuda.so");
  AF_CHECK(attend.find() != nullptr, "anyflash: this PyTorch has no CUDA operators");
  const Tensor q = by_head(args.q), k = by_head(args.k), v = by_head(args.v);
  double scale = args.softmax_scale;
  AtenTensorHandle out, lse, unused[5];
  int64_t unused_q, unused_k;
  check_code(attend.find()(q.get(), k.get(), v.get(), /*attn_bias=*/nullptr,
                           /*compute_log_sumexp=*/1, /*dropout_p=*/0.0,
                           /*is_causal=*/0, /*return_debug_mask=*/0, &scale, &out, &lse, &unused[0],
                           &unused[1], &unused_q, &unused_k, &unused[2], &unused[3], &unused[4]),
             "aten::_scaled_dot_product_cudnn_attention");
  for (AtenTensorHandle handle : unused) Tensor released(handle);
  return {Tensor(out), Tensor(lse)};
}

}  // namespace

ForwardResult forward(const AttentionArgs& args) {
  if (is_for_math(args)) return math::forward(args);
  const auto [out, lse] = call_forward(args);
  return {as_promised(by_head(out), args.q),
          contiguous(reshape(lse, {args.q.size(0), args.heads(), args.q.size(1)}))};
}

Gradients backward(const AttentionArgs& args, const BackwardArgs& grad) {
  if (is_for_math(args)) return math::backward(args, grad);
  const Tensor no_state = full({}, 0, args.q, ScalarType::Long);
  const auto [dq, dk, dv] = aten<std::tuple<Tensor, Tensor, Tensor>>(
      "aten::_scaled_dot_product_cudnn_attention_backward", "", by_head(grad.dout), by_head(args.q),
      by_head(args.k), by_head(args.v), by_head(grad.out), unsqueeze(grad.lse, -1), no_state,
      no_state, /*attn_bias=*/undefined(), /*cum_seq_q=*/undefined(),
      /*cum_seq_k=*/undefined(), args.q.size(1), args.k.size(1), /*dropout_p=*/0.0,
      /*is_causal=*/false, std::optional<double>(args.softmax_scale));
  return promised_gradients(args, by_head(dq), by_head(dk), by_head(dv));
}

}  // namespace anyflash::aten_cudnn
