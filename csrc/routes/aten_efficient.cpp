// PyTorch's memory-efficient attention on CUDA: old GPUs, fp32, biases. Key heads are repeated for
// their query heads; its log-sum-exp has one entry per sequence, padded to a multiple of 32 rows.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <algorithm>
#include <limits>

#include "attention/results.h"
#include "core/late_symbol.h"
#include "routes/padded.h"
#include "routes/routes.h"

namespace anyflash::aten_efficient {
namespace {

using OptionalInt = std::optional<int64_t>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kNoMask = 0, kBottomRight = 2;
constexpr int64_t kLseRows = 32;
constexpr int64_t kAlignment = 16;      // bytes, of every row of q, k and v
constexpr int64_t kBiasAlignment = 16;  // elements between rows of the bias

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// A bias carries the causal mask, so that it alone tells which rows see nothing.
bool has_causal_mask(const AttentionArgs& args) { return args.purely_causal() && !args.bias; }

// Whether the kernels know this causal mask. Where a sequence has more queries than keys, they
// miscount them (the difference is unsigned). The lengths of packed sequences are on the device:
// all that can be known here is that queries and keys have the same.
bool is_mask_right(const AttentionArgs& args) {
  if (!args.packed()) return args.max_seqlen_q <= args.max_seqlen_k;
  return args.cu_seqlens_q->const_data_ptr() == args.cu_seqlens_k->const_data_ptr();
}

// Nothing to compute, a scale that does not keep the order of the scores, a bias beside packed
// sequences, which this attention does not take together, or what the kernels get wrong.
bool is_for_math(const AttentionArgs& args) {
  return args.empty() || args.softmax_scale <= 0 || (args.packed() && args.bias) ||
         (has_causal_mask(args) && !is_mask_right(args));
}

int64_t mask_type(const AttentionArgs& args) {
  return has_causal_mask(args) ? kBottomRight : kNoMask;
}

// Four dimensions, packed tensors as one batch entry, rows at aligned addresses, each head with its
// own (a stride of 0 is taken for something else).
Tensor operand(const AttentionArgs& args, const Tensor& x) {
  const Tensor batch = args.packed() ? unsqueeze(x, 0) : x;
  const Sizes strides = batch.strides();
  const int64_t element = batch.scalar_type() == ScalarType::Float ? 4 : 2;
  bool is_aligned = reinterpret_cast<uintptr_t>(batch.const_data_ptr()) % kAlignment == 0;
  for (int64_t dim = 0; dim < 3; ++dim) {
    is_aligned = is_aligned && strides[dim] * element % kAlignment == 0;
  }
  if (is_aligned && strides[2] != 0) return batch;
  const Tensor copy = empty(batch.sizes(), batch, batch.scalar_type());
  copy_(copy, batch);
  return copy;
}

// Every key head repeated for its query heads, as a copy.
Tensor repeated(const AttentionArgs& args, const Tensor& x) {
  const Tensor batch = operand(args, x);
  const int64_t group = args.heads() / args.heads_k();
  if (group == 1) return batch;
  const Sizes sizes = batch.sizes();
  const Tensor groups =
      expand(unsqueeze(batch, 3), {sizes[0], sizes[1], sizes[2], group, sizes[3]});
  return reshape(groups, {sizes[0], sizes[1], args.heads(), sizes[3]});
}

// The gradient of what repeated() did: (1 or batch, rows, heads, n) -> k's shape.
Tensor summed(const AttentionArgs& args, const Tensor& gradient) {
  const int64_t group = args.heads() / args.heads_k();
  const Tensor keys = group == 1 ? gradient : sum(split_dim(gradient, 2, group), {3});
  return args.packed() ? select(keys, 0, 0) : keys;
}

// Keys that a causal mask hides: bool (seqlen_q, seqlen_k)
Tensor hidden_by_causality(const AttentionArgs& args) {
  const Tensor diagonal =
      add(arange(args.max_seqlen_q, args.q), scalar(args.max_seqlen_k - args.max_seqlen_q));
  return aten<Tensor>("aten::lt", "Tensor", unsqueeze(diagonal, -1),
                      arange(args.max_seqlen_k, args.q));
}

void hide(const Tensor& bias, const Tensor& hidden) {
  aten<Tensor>("aten::masked_fill_", "Tensor", bias, hidden, scalar(-kInfinity));
}

// Bias and causal mask in q's dtype: (batch, heads, seqlen_q, seqlen_k), expanded, rows at aligned
// distances.
OptionalTensor aligned_bias(const AttentionArgs& args) {
  if (!args.bias) return std::nullopt;
  const Tensor bias = four_dims(*args.bias);
  const int64_t rows = args.purely_causal() ? args.max_seqlen_q : bias.size(2);
  const Tensor storage =
      full({bias.size(0), bias.size(1), rows, round_up(args.max_seqlen_k, kBiasAlignment)}, 0,
           args.q, args.q.scalar_type());
  const Tensor result = narrow(storage, 3, 0, args.max_seqlen_k);
  if (bias.scalar_type() == ScalarType::Bool) {
    hide(result, aten<Tensor>("aten::logical_not", "", bias));
  } else {
    copy_(result, bias);
  }
  if (args.purely_causal()) hide(result, hidden_by_causality(args));
  return expand(result, {args.batch(), args.heads(), args.max_seqlen_q, args.max_seqlen_k});
}

Tensor lengths_of(const AttentionArgs& args, const OptionalTensor& starts) {
  const auto from = [&](int64_t first) {
    return to_dtype(narrow(*starts, 0, first, args.batch()), ScalarType::Long);
  };
  return sub(from(1), from(0));
}

RowMap lse_rows_of(const AttentionArgs& args) {
  return RowMap(args.cu_seqlens_q, lengths_of(args, args.cu_seqlens_q), std::nullopt,
                args.q.size(0), 0, round_up(args.longest_q(), kLseRows));
}

// (batch, heads, padded rows) -> schemas.def
Tensor to_our_lse(const AttentionArgs& args, const Tensor& lse) {
  if (!args.packed()) return contiguous(narrow(lse, 2, 0, args.q.size(1)));
  return contiguous(
      transpose(lse_rows_of(args).unpad(contiguous(transpose(lse, 1, 2)), kInfinity), 0, 1));
}

// The inverse. Padding rows see nothing.
Tensor to_their_lse(const AttentionArgs& args, const Tensor& lse) {
  if (args.packed())
    return contiguous(
        transpose(lse_rows_of(args).pad(contiguous(transpose(lse, 0, 1)), kInfinity), 1, 2));
  const int64_t rows = args.q.size(1);
  const Tensor padded =
      full({lse.size(0), lse.size(1), round_up(rows, kLseRows)}, kInfinity, lse, lse.scalar_type());
  copy_(narrow(padded, 2, 0, rows), lse);
  return padded;
}

// (batch, heads, seqlen_q) or (heads, total_q) -> broadcastable to out
Tensor by_row(const AttentionArgs& args, const Tensor& x) {
  return unsqueeze(args.packed() ? transpose(x, 0, 1) : transpose(x, 1, 2), -1);
}

// Rows that see no key: out 0, lse +inf, whatever the kernel left there (a log-sum-exp of -inf, or
// NaN where a bias hides all keys).
void clear_empty_rows(const AttentionArgs& args, const OptionalTensor& bias, const Tensor& out,
                      const Tensor& lse) {
  const Tensor empty_row =
      bias ? aten<Tensor>("aten::eq", "Tensor", amax(*bias, -1), scalar(-kInfinity))
           : aten<Tensor>("aten::lt", "Tensor", lse, scalar(-1e37));
  aten<Tensor>("aten::masked_fill_", "Tensor", lse, empty_row, scalar(kInfinity));
  aten<Tensor>("aten::masked_fill_", "Tensor", out, by_row(args, empty_row), scalar(0.0));
}

// The kernel leaves gradients that no block of queries or keys reaches unwritten: those of rows
// without keys and of sequences without queries.
void clear_unreached(const AttentionArgs& args, const Tensor& lse, const Gradients& result) {
  const Tensor empty_row = aten<Tensor>("aten::eq", "Tensor", lse, scalar(kInfinity));
  aten<Tensor>("aten::masked_fill_", "Tensor", result.dq, by_row(args, empty_row), scalar(0.0));
  if (!args.packed()) return;
  const int64_t rows = args.longest_k();
  const Tensor queries = to_dtype(lengths_of(args, args.cu_seqlens_q), ScalarType::Float);
  const RowMap keys(args.cu_seqlens_k, lengths_of(args, args.cu_seqlens_k), std::nullopt,
                    args.k.size(0), 0, rows);
  const Tensor per_key =
      keys.unpad(contiguous(expand(unsqueeze(queries, -1), {args.batch(), rows})), 0);
  const Tensor unreached =
      unsqueeze(unsqueeze(aten<Tensor>("aten::eq", "Tensor", per_key, scalar(0.0)), -1), -1);
  aten<Tensor>("aten::masked_fill_", "Tensor", result.dk, unreached, scalar(0.0));
  aten<Tensor>("aten::masked_fill_", "Tensor", result.dv, unreached, scalar(0.0));
}

// out and the padded log-sum-exp. Not through the dispatcher: its results are of several types
// (aten.h).
std::pair<Tensor, Tensor> call_forward(const AttentionArgs& args, const OptionalTensor& bias) {
  static LateSymbol<decltype(aoti_torch_cuda__efficient_attention_forward)> attend(
      "aoti_torch_cuda__efficient_attention_forward", "libtorch_cuda.so");
  AF_CHECK(attend.find() != nullptr, "anyflash: this PyTorch has no CUDA operators");
  const Tensor q = operand(args, args.q), k = repeated(args, args.k), v = repeated(args, args.v);
  const auto handle = [](const OptionalTensor& x) { return x ? x->get() : nullptr; };
  AtenTensorHandle bias_handle = handle(bias), starts_q = handle(args.cu_seqlens_q),
                   starts_k = handle(args.cu_seqlens_k);
  int64_t longest_q = args.longest_q(), longest_k = args.longest_k();
  const bool packed = args.packed();
  double scale = args.softmax_scale;
  AtenTensorHandle out, lse, seed, offset;
  int64_t unused_q, unused_k;
  check_code(
      attend.find()(q.get(), k.get(), v.get(), bias ? &bias_handle : nullptr,
                    packed ? &starts_q : nullptr, packed ? &starts_k : nullptr,
                    packed ? &longest_q : nullptr, packed ? &longest_k : nullptr, /*dropout_p=*/0.0,
                    mask_type(args), /*compute_log_sumexp=*/1, &scale, /*seqlen_k=*/nullptr,
                    /*window_size=*/nullptr, &out, &lse, &seed, &offset, &unused_q, &unused_k),
      "aten::_efficient_attention_forward");
  Tensor unused_seed(seed), unused_offset(offset);  // owned, so released
  return {Tensor(out), Tensor(lse)};
}

}  // namespace

ForwardResult forward(const AttentionArgs& args) {
  if (is_for_math(args)) return math::forward(args);
  const OptionalTensor bias = aligned_bias(args);
  const auto [result, padded_lse] = call_forward(args, bias);
  const Tensor out = args.packed() ? select(result, 0, 0) : result;
  const Tensor lse = to_our_lse(args, padded_lse);
  clear_empty_rows(args, bias, out, lse);
  return {args.head_dim_v() == args.head_dim() ? as_promised(out, args.q) : contiguous(out), lse};
}

Gradients backward(const AttentionArgs& args, const BackwardArgs& grad) {
  if (is_for_math(args)) return math::backward(args, grad);
  const Tensor no_state = full({}, 0, args.q, ScalarType::Long);
  const auto [dq, dk, dv, dbias] = aten<std::tuple<Tensor, Tensor, Tensor, Tensor>>(
      "aten::_efficient_attention_backward", "", operand(args, grad.dout), operand(args, args.q),
      repeated(args, args.k), repeated(args, args.v), aligned_bias(args),
      contiguous(operand(args, grad.out)), args.cu_seqlens_q, args.cu_seqlens_k, args.longest_q(),
      args.longest_k(), to_their_lse(args, grad.lse), /*dropout_p=*/0.0, no_state, no_state,
      mask_type(args),
      /*bias_requires_grad=*/false, std::optional<double>(args.softmax_scale), OptionalInt(),
      OptionalInt(),
      /*shared_storage_dqdkdv=*/false);
  const Gradients result = promised_gradients(args, args.packed() ? select(dq, 0, 0) : dq,
                                              summed(args, dk), summed(args, dv));
  clear_unreached(args, grad.lse, result);
  return result;
}

}  // namespace anyflash::aten_efficient
