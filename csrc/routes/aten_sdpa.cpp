// PyTorch's public attention, which picks what the device is good at. It knows square causal masks
// and explicit ones, returns no log-sum-exp, and shares no key heads on every device.
#include <limits>

#include "attention/results.h"
#include "routes/batches.h"
#include "routes/routes.h"

namespace anyflash::aten_sdpa {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What a call computes in. A finite bias must stay finite when it is added; fp16 products are
// emulated on most CPUs (a hundred times slower).
ScalarType compute_type(const AttentionArgs& args) {
  const bool adds_bias = args.bias && args.bias->scalar_type() != ScalarType::Bool;
  const bool is_emulated = args.q.is_cpu() && args.q.scalar_type() == ScalarType::Half;
  return adds_bias || is_emulated ? accumulator_type(args.q) : args.q.scalar_type();
}

// Key heads repeated for their query heads.
Tensor expanded(const Tensor& x, int64_t heads) {
  if (x.size(2) == heads) return x;
  return aten<Tensor>("aten::repeat_interleave", "self_int", x, heads / x.size(2),
                      std::optional<int64_t>(2), std::optional<int64_t>());
}

// out (n, rows, heads, head_dim_v) of one call. `mask`: (n or 1, heads or 1, rows, keys).
Tensor call(const AttentionArgs& args, const DenseBatch& batch, const OptionalTensor& mask,
            bool is_causal) {
  const ScalarType dtype = compute_type(args);
  Tensor q = to_dtype(batch.q, dtype);
  double scale = args.softmax_scale;
  if (scale <= 0) {  // -inf of a mask comes before the scale
    q = mul(q, scale);
    scale = 1;
  }
  const auto keys = [&](const Tensor& x) {
    return transpose(to_dtype(expanded(x, args.heads()), dtype), 1, 2);
  };
  return transpose(
      aten<Tensor>("aten::scaled_dot_product_attention", "", transpose(q, 1, 2), keys(batch.k),
                   keys(batch.v), mask, 0.0, is_causal, std::optional<double>(scale)),
      1, 2);
}

struct ExplicitMask {
  Tensor values;  // boolean, true = visible, or what is added
  Tensor dead;    // rows that see no key: (n or 1, heads or 1, rows, 1). Their mask hides nothing
};

ExplicitMask mask_of(const AttentionArgs& args, const DenseMask& mask, const OptionalTensor& bias,
                     const Chunk& chunk) {
  OptionalTensor hidden;
  if (mask.hides()) hidden = mask.hidden(chunk);
  if (!bias || bias->scalar_type() == ScalarType::Bool) {
    Tensor visible = hidden ? aten<Tensor>("aten::logical_not", "", *hidden) : *bias;
    if (hidden && bias) {
      visible = aten<Tensor>("aten::bitwise_and", "Tensor", visible, bias_chunk(*bias, chunk));
    } else if (bias) {
      visible = bias_chunk(*bias, chunk);
    }
    const Tensor dead =
        aten<Tensor>("aten::logical_not", "", aten<Tensor>("aten::any", "dim", visible, -1, true));
    return {aten<Tensor>("aten::bitwise_or", "Tensor", visible, dead), dead};
  }
  Tensor added = to_dtype(bias_chunk(*bias, chunk), compute_type(args));
  if (hidden)
    added = aten<Tensor>("aten::masked_fill", "Tensor", added, *hidden, scalar(-kInfinity));
  const Tensor dead = aten<Tensor>("aten::eq", "Tensor", amax(added, -1, true), scalar(-kInfinity));
  return {aten<Tensor>("aten::masked_fill", "Tensor", added, dead, scalar(0.0)), dead};
}

void forward_masked(const AttentionArgs& args, const DenseBatch& batch, const Tensor& out) {
  const DenseMask mask(args, batch);
  OptionalTensor bias;
  if (args.bias) bias = narrow_broadcast(four_dims(*args.bias), 0, batch.sequence, batch.q.size(0));
  for (const Chunk& chunk : mask.chunks()) {
    const Tensor rows = narrow(out, 1, chunk.row, chunk.rows);
    if (chunk.keys == 0) {
      fill_(rows, 0);
      continue;
    }
    const ExplicitMask explicit_mask = mask_of(args, mask, bias, chunk);
    const DenseBatch part{batch.sequence,
                          narrow(batch.q, 1, chunk.row, chunk.rows),
                          narrow(batch.k, 1, chunk.key, chunk.keys),
                          narrow(batch.v, 1, chunk.key, chunk.keys),
                          std::nullopt,
                          std::nullopt};
    copy_(rows, call(args, part, explicit_mask.values, false));
    aten<Tensor>("aten::masked_fill_", "Tensor", rows, transpose(explicit_mask.dead, 1, 2),
                 scalar(0.0));
  }
}

void forward_batch(const AttentionArgs& args, const DenseBatch& batch, const Tensor& out,
                   const Tensor& lse) {
  fill_(lse, std::numeric_limits<double>::quiet_NaN());  // routes.def: there is none
  const DenseMask mask(args, batch);
  const bool is_square_causal = mask.is_square_causal();
  if (batch.k.size(1) == 0) {
    fill_(out, 0);
  } else if (!args.bias && (is_square_causal || !mask.hides())) {
    copy_(out, call(args, batch, std::nullopt, is_square_causal));
  } else {
    for_each_part(batch, [&](const DenseBatch& part, int64_t begin, int64_t size) {
      forward_masked(args, part, narrow(out, 0, begin, size));
    });
  }
}

}  // namespace

ForwardResult forward(const AttentionArgs& args) { return forward_in_batches(args, forward_batch); }

}  // namespace anyflash::aten_sdpa
