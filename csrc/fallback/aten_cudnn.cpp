// cuDNN's attention in PyTorch: dense, without a mask, only when asked for by name.
#include "fallback/promised.h"
#include "fallback/routes.h"

namespace anyflash::aten_cudnn {
namespace {

Tensor by_head(const Tensor& x) { return transpose(x, 1, 2); }

bool has_nothing_to_do(const AttentionArgs& args) { return args.q.numel() == 0 || args.k.numel() == 0; }

}  // namespace

ForwardResult forward(const AttentionArgs& args) {
  if (has_nothing_to_do(args)) return math::forward(args);
  // out, log-sum-exp, then what packed sequences, dropout and debugging would need.
  using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t, int64_t, Tensor, Tensor, Tensor>;
  const Results results =
      aten<Results>("aten::_scaled_dot_product_cudnn_attention", "", by_head(args.q), by_head(args.k), by_head(args.v), OptionalTensor(),
                    /*compute_log_sumexp=*/true, /*dropout_p=*/0.0, /*is_causal=*/false, /*return_debug_mask=*/false,
                    std::optional<double>(args.softmax_scale));
  const Tensor lse = reshape(std::get<1>(results), {args.q.size(0), args.heads(), args.q.size(1)});
  return {as_promised(by_head(std::get<0>(results)), args.q), contiguous(lse)};
}

Gradients backward(const AttentionArgs& args, const BackwardArgs& grad) {
  if (has_nothing_to_do(args)) return math::backward(args, grad);
  const Tensor no_state = full({}, 0, args.q, ScalarType::Long);
  const auto [dq, dk, dv] = aten<std::tuple<Tensor, Tensor, Tensor>>(
      "aten::_scaled_dot_product_cudnn_attention_backward", "", by_head(grad.dout), by_head(args.q), by_head(args.k), by_head(args.v),
      by_head(grad.out), unsqueeze(grad.lse, -1), no_state, no_state, /*attn_bias=*/undefined(), /*cum_seq_q=*/undefined(),
      /*cum_seq_k=*/undefined(), args.q.size(1), args.k.size(1), /*dropout_p=*/0.0, /*is_causal=*/false,
      std::optional<double>(args.softmax_scale));
  return promised_gradients(args, by_head(dq), by_head(dk), by_head(dv));
}

}  // namespace anyflash::aten_cudnn
