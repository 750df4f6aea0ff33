// PyTorch's CUDA flash attention, through the operators that know packed sequences, windows and
// bottom-right causal masks.
#include <algorithm>

#include "attention/results.h"
#include "routes/routes.h"

namespace anyflash::aten_flash {
namespace {

using OptionalInt = std::optional<int64_t>;

// A left window without a right end is closed by this attention at the key length, which hides keys
// where a sequence has more queries than keys: known for dense problems, not for packed ones, whose
// lengths are on the device.
bool may_lose_keys(const AttentionArgs& args) {
  return args.window_left >= 0 && args.window_right < 0 &&
         (args.packed() || args.seqused_k || args.max_seqlen_q > args.max_seqlen_k);
}

// It looks for the largest score before it scales, so the scale must be positive.
bool is_for_math(const AttentionArgs& args) {
  return may_lose_keys(args) || args.empty() || args.softmax_scale <= 0;
}

struct Window {
  OptionalInt left, right;
  explicit Window(const AttentionArgs& args) {
    if (args.purely_causal() || (args.window_left < 0 && args.window_right < 0)) return;
    left = args.window_left;
    right = args.window_right;
  }
};

// Storage of seqused_k's keys: this attention takes per-sequence lengths of packed sequences only.
struct Packed {
  Tensor q, k, v;
  OptionalTensor cu_seqlens_q, cu_seqlens_k;
};

Tensor as_packed(const Tensor& x) {
  return reshape(x, {x.size(0) * x.size(1), x.size(2), x.size(3)});
}

// 0, seqlen, 2 seqlen, ...: (batch + 1) int32
Tensor equal_starts(const AttentionArgs& args, int64_t seqlen) {
  return to_dtype(mul(arange(args.batch() + 1, args.q), scalar(seqlen)), ScalarType::Int);
}

Packed packed_for(const AttentionArgs& args) {
  if (args.packed() || !args.seqused_k)
    return {args.q, args.k, args.v, args.cu_seqlens_q, args.cu_seqlens_k};
  return {as_packed(args.q), as_packed(args.k), as_packed(args.v),
          equal_starts(args, args.max_seqlen_q), equal_starts(args, args.max_seqlen_k)};
}

// out, log-sum-exp, then three results of no use here (dropout state, a debug mask).
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// For packed sequences of one query each, this attention takes a shortcut that breaks where one of
// them is empty.
int64_t longest_query(const AttentionArgs& args) {
  const bool some_empty = args.packed() && args.q.size(0) != args.batch();
  return some_empty ? std::max<int64_t>(args.longest_q(), 2) : args.longest_q();
}

// Later versions append arguments (block_table, num_splits), which read as None (aten.h).
Results call_forward(const AttentionArgs& args, const Packed& packed) {
  const Window window(args);
  return aten<Results>("aten::_flash_attention_forward", "", packed.q, packed.k, packed.v,
                       packed.cu_seqlens_q, packed.cu_seqlens_k, longest_query(args),
                       args.longest_k(), /*dropout_p=*/0.0, args.purely_causal(),
                       /*return_debug_mask=*/false, std::optional<double>(args.softmax_scale),
                       window.left, window.right, args.seqused_k, args.alibi_slopes);
}

// (heads, batch * seqlen) -> (batch, heads, seqlen)
Tensor dense_lse(const AttentionArgs& args, const Tensor& lse) {
  return transpose(split_dim(lse, 1, args.max_seqlen_q), 0, 1);
}

}  // namespace

ForwardResult forward(const AttentionArgs& args) {
  if (is_for_math(args)) return math::forward(args);
  const Packed packed = packed_for(args);
  const Results results = call_forward(args, packed);
  Tensor out = std::get<0>(results), lse = std::get<1>(results);
  if (packed.cu_seqlens_q && !args.packed()) {
    out = split_dim(out, 0, args.max_seqlen_q);
    lse = dense_lse(args, lse);
  }
  return {as_promised(out, args.q), contiguous(lse)};
}

Gradients backward(const AttentionArgs& args, const BackwardArgs& grad) {
  if (is_for_math(args)) return math::backward(args, grad);
  const Window window(args);
  const Tensor no_state = full({2}, 0, args.q, ScalarType::Long);
  const auto starts = [&](const OptionalTensor& x) { return args.packed() ? *x : undefined(); };
  const auto [dq, dk, dv] = aten<std::tuple<Tensor, Tensor, Tensor>>(
      "aten::_flash_attention_backward", "", grad.dout, args.q, args.k, args.v, grad.out,
      contiguous(grad.lse), starts(args.cu_seqlens_q), starts(args.cu_seqlens_k), args.longest_q(),
      args.longest_k(), /*dropout_p=*/0.0, args.purely_causal(), no_state, no_state,
      std::optional<double>(args.softmax_scale), window.left, window.right);
  return promised_gradients(args, dq, dk, dv);
}

}  // namespace anyflash::aten_flash
