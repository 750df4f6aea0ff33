// PyTorch's memory-efficient attention on CUDA: old GPUs, fp32, biases. Key heads are repeated for their query heads; its log-sum-exp has
// one entry per sequence, padded to a multiple of 32 rows.
#include <limits>

#include "fallback/padded.h"
#include "fallback/promised.h"
#include "fallback/routes.h"
#include "fallback/runs.h"

namespace anyflash::aten_efficient {
namespace {

using OptionalInt = std::optional<int64_t>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kNoMask = 0, kBottomRight = 2;
constexpr int64_t kLseRows = 32;
constexpr int64_t kBiasAlignment = 16;  // elements between rows of the bias

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

bool has_nothing_to_do(const AttentionArgs& args) { return args.q.numel() == 0 || args.k.numel() == 0 || args.max_seqlen_k == 0; }

int64_t mask_type(const AttentionArgs& args) { return args.purely_causal() ? kBottomRight : kNoMask; }

// Four dimensions: packed tensors are one batch entry.
Tensor batched(const AttentionArgs& args, const Tensor& x) { return args.packed() ? unsqueeze(x, 0) : x; }

// Every key head repeated for its query heads, as a copy.
Tensor repeated(const AttentionArgs& args, const Tensor& x) {
  const Tensor batch = batched(args, x);
  const int64_t group = args.heads() / args.heads_k();
  if (group == 1) return batch;
  const Sizes sizes = batch.sizes();
  const Tensor groups = expand(unsqueeze(batch, 3), {sizes[0], sizes[1], sizes[2], group, sizes[3]});
  return reshape(groups, {sizes[0], sizes[1], args.heads(), sizes[3]});
}

// The gradient of what repeated() did: (1 or batch, rows, heads, n) -> k's shape.
Tensor summed(const AttentionArgs& args, const Tensor& gradient) {
  const int64_t group = args.heads() / args.heads_k();
  const Tensor keys = group == 1 ? gradient : sum(split_dim(gradient, 2, group), {3});
  return args.packed() ? select(keys, 0, 0) : keys;
}

// In q's dtype, (batch, heads, seqlen_q, seqlen_k), rows at aligned distances.
OptionalTensor aligned_bias(const AttentionArgs& args) {
  if (!args.bias) return std::nullopt;
  const int64_t width = round_up(args.max_seqlen_k, kBiasAlignment);
  const Tensor storage = full({args.batch(), args.heads(), args.max_seqlen_q, width}, 0, args.q, args.q.scalar_type());
  const Tensor result = narrow(storage, 3, 0, args.max_seqlen_k);
  if (args.bias->scalar_type() != ScalarType::Bool) {
    copy_(result, *args.bias);
    return result;
  }
  const Tensor hidden = aten<Tensor>("aten::logical_not", "", *args.bias);
  aten<Tensor>("aten::masked_fill_", "Tensor", result, hidden, scalar(-kInfinity));
  return result;
}

RowMap lse_rows_of(const AttentionArgs& args) {
  const int64_t count = args.batch();
  const Tensor starts = to_dtype(*args.cu_seqlens_q, ScalarType::Long);
  const Tensor lengths = sub(narrow(starts, 0, 1, count), narrow(starts, 0, 0, count));
  return RowMap(starts, lengths, std::nullopt, args.q.size(0), 0, round_up(args.max_seqlen_q, kLseRows));
}

// (batch, heads, padded rows) -> schemas.def
Tensor to_our_lse(const AttentionArgs& args, const Tensor& lse) {
  if (!args.packed()) return contiguous(narrow(lse, 2, 0, args.q.size(1)));
  return contiguous(transpose(lse_rows_of(args).unpad(contiguous(transpose(lse, 1, 2)), kInfinity), 0, 1));
}

// The inverse. Padding rows see nothing.
Tensor to_their_lse(const AttentionArgs& args, const Tensor& lse) {
  if (args.packed()) return contiguous(transpose(lse_rows_of(args).pad(contiguous(transpose(lse, 0, 1)), kInfinity), 1, 2));
  const int64_t rows = args.q.size(1);
  const Tensor padded = full({lse.size(0), lse.size(1), round_up(rows, kLseRows)}, kInfinity, lse, lse.scalar_type());
  copy_(narrow(padded, 2, 0, rows), lse);
  return padded;
}

// Rows that see no key: out 0, lse +inf, whatever the kernel left there.
void clear_empty_rows(const AttentionArgs& args, const Tensor& out, const Tensor& lse) {
  const Tensor finite = aten<Tensor>("aten::isfinite", "", lse);
  const Tensor low = aten<Tensor>("aten::lt", "Tensor", lse, scalar(-1e37));
  const Tensor empty_row = aten<Tensor>("aten::logical_or", "", aten<Tensor>("aten::logical_not", "", finite), low);
  aten<Tensor>("aten::masked_fill_", "Tensor", lse, empty_row, scalar(kInfinity));
  const Tensor by_row = args.packed() ? transpose(empty_row, 0, 1) : transpose(empty_row, 1, 2);
  aten<Tensor>("aten::masked_fill_", "Tensor", out, unsqueeze(by_row, -1), scalar(0.0));
}

}  // namespace

ForwardResult forward(const AttentionArgs& args) {
  if (has_nothing_to_do(args)) return math::forward(args);
  const auto longest = [&](int64_t seqlen) { return args.packed() ? OptionalInt(seqlen) : std::nullopt; };
  // out, log-sum-exp, then the dropout's state and the two lengths again.
  using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t, int64_t>;
  const Results results = aten<Results>(
      "aten::_efficient_attention_forward", "", batched(args, args.q), repeated(args, args.k), repeated(args, args.v), aligned_bias(args),
      args.cu_seqlens_q, args.cu_seqlens_k, longest(args.max_seqlen_q), longest(args.max_seqlen_k), /*dropout_p=*/0.0, mask_type(args),
      /*compute_log_sumexp=*/true, std::optional<double>(args.softmax_scale), OptionalTensor(), OptionalInt());
  const Tensor out = args.packed() ? select(std::get<0>(results), 0, 0) : std::get<0>(results);
  const Tensor lse = to_our_lse(args, std::get<1>(results));
  clear_empty_rows(args, out, lse);
  return {args.head_dim_v() == args.head_dim() ? as_promised(out, args.q) : contiguous(out), lse};
}

Gradients backward(const AttentionArgs& args, const BackwardArgs& grad) {
  if (has_nothing_to_do(args)) return math::backward(args, grad);
  const Tensor no_state = full({}, 0, args.q, ScalarType::Long);
  const auto [dq, dk, dv, dbias] = aten<std::tuple<Tensor, Tensor, Tensor, Tensor>>(
      "aten::_efficient_attention_backward", "", batched(args, grad.dout), batched(args, args.q), repeated(args, args.k),
      repeated(args, args.v), aligned_bias(args), batched(args, grad.out), args.cu_seqlens_q, args.cu_seqlens_k, args.max_seqlen_q,
      args.max_seqlen_k, to_their_lse(args, grad.lse), /*dropout_p=*/0.0, no_state, no_state, mask_type(args),
      /*bias_requires_grad=*/false, std::optional<double>(args.softmax_scale), OptionalInt(), OptionalInt(), false);
  return promised_gradients(args, args.packed() ? select(dq, 0, 0) : dq, summed(args, dk), summed(args, dv));
}

}  // namespace anyflash::aten_efficient
