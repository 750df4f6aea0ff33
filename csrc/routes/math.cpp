// Attention composed from plain operators (dense.h): every feature, on any device. On the CPU
// sequence by sequence, with exact lengths; elsewhere padded, so that no length has to come to the
// host.
#include <algorithm>
#include <limits>

#include "attention/results.h"
#include "routes/dense.h"
#include "routes/padded.h"
#include "routes/routes.h"
#include "routes/runs.h"

namespace anyflash::math {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Scores of this many elements are one chunk (dense.cpp) at most; batches are cut so that a chunk
// of 16 rows stays below it.
constexpr int64_t kMaxScores = int64_t{1} << 24;

// `x` of a batch reduced to sequences [begin, begin + count); the lengths of one sequence are a
// slice too.
OptionalTensor sequences_of(const OptionalTensor& x, int64_t begin, int64_t count) {
  return x ? OptionalTensor(narrow(*x, 0, begin, count)) : x;
}

template <class Compute>
void for_each_part(const DenseBatch& batch, Compute compute) {
  const int64_t count = batch.q.size(0);
  const int64_t rows = std::min<int64_t>(batch.q.size(1), DropoutMask::kTile);
  const int64_t scores = std::max<int64_t>(batch.q.size(2) * rows * batch.k.size(1), 1);
  const int64_t step = std::clamp<int64_t>(kMaxScores / scores, 1, std::max<int64_t>(count, 1));
  for (int64_t begin = 0; begin < count; begin += step) {
    const int64_t size = std::min(step, count - begin);
    compute(DenseBatch{batch.sequence + begin, narrow(batch.q, 0, begin, size),
                       narrow(batch.k, 0, begin, size), narrow(batch.v, 0, begin, size),
                       sequences_of(batch.lengths_q, begin, size),
                       sequences_of(batch.lengths_k, begin, size)},
            begin, size);
  }
}

void forward_dense(const AttentionArgs& args, const DenseBatch& batch, const Tensor& out,
                   const Tensor& lse) {
  for_each_part(batch, [&](const DenseBatch& part, int64_t begin, int64_t size) {
    DenseAttention(args, part).forward(narrow(out, 0, begin, size), narrow(lse, 0, begin, size));
  });
}

void backward_dense(const AttentionArgs& args, const DenseBatch& batch, const DenseGrad& grad,
                    const DenseGradResult& result) {
  for_each_part(batch, [&](const DenseBatch& part, int64_t begin, int64_t size) {
    const auto own = [&](const Tensor& x) { return narrow(x, 0, begin, size); };
    DenseAttention(args, part)
        .backward(
            {own(grad.dout), own(grad.out), own(grad.lse), sequences_of(grad.dlse, begin, size)},
            {own(result.dq), own(result.dk), own(result.dv), result.dbias, result.dsinks});
  });
}

// Sums over the batch, in the accumulator type until the end.
struct SharedGradients {
  OptionalTensor dbias, dsinks;

  SharedGradients(const AttentionArgs& args, const BackwardArgs& grad) {
    const ScalarType dtype = accumulator_type(args.q);
    if (grad.bias_requires_grad) {
      dbias = full(four_dims(*args.bias).sizes(), 0, args.q, dtype);
    }
    if (grad.sinks_requires_grad) dsinks = full(args.sinks->sizes(), 0, args.q, dtype);
  }

  OptionalTensor bias_gradient(const AttentionArgs& args) const {
    if (!dbias) return std::nullopt;
    return to_dtype(reshape(*dbias, args.bias->sizes()), args.bias->scalar_type());
  }
  OptionalTensor sinks_gradient(const AttentionArgs& args) const {
    if (!dsinks) return std::nullopt;
    return to_dtype(*dsinks, args.sinks->scalar_type());
  }
};

}  // namespace

ForwardResult forward_by_sequence(const AttentionArgs& args) {
  const Tensor out = new_out(args);
  const Tensor lse = new_lse(args);
  clear_unowned_rows(args, out, lse);
  for (const Run& run : split_runs(args)) {
    const DenseBatch batch{run.sequence,
                           query_rows(args, run, args.q),
                           key_rows(args, run, args.k),
                           key_rows(args, run, args.v),
                           std::nullopt,
                           std::nullopt};
    forward_dense(args, batch, query_rows(args, run, out), lse_rows(args, run, lse));
  }
  return {out, lse};
}

Gradients backward_by_sequence(const AttentionArgs& args, const BackwardArgs& grad) {
  const SharedGradients shared(args, grad);
  const Tensor dq = zeros_like(args.q), dk = zeros_like(args.k), dv = zeros_like(args.v);
  for (const Run& run : split_runs(args)) {
    if (run.k.length == 0) continue;
    const DenseBatch batch{run.sequence,
                           query_rows(args, run, args.q),
                           key_rows(args, run, args.k),
                           key_rows(args, run, args.v),
                           std::nullopt,
                           std::nullopt};
    OptionalTensor dlse;
    if (grad.dlse) dlse = lse_rows(args, run, *grad.dlse);
    backward_dense(args, batch,
                   {query_rows(args, run, grad.dout), query_rows(args, run, grad.out),
                    lse_rows(args, run, grad.lse), dlse},
                   {query_rows(args, run, dq), key_rows(args, run, dk), key_rows(args, run, dv),
                    shared.dbias, shared.dsinks});
  }
  return {dq, dk, dv, shared.bias_gradient(args), shared.sinks_gradient(args)};
}

ForwardResult forward_padded(const AttentionArgs& args) {
  const Tensor out = new_out(args);
  const Tensor lse = new_lse(args);
  if (out.numel() == 0 && lse.numel() == 0) return {out, lse};
  const PaddedProblem padded(args);
  const DenseBatch batch{0, padded.q, padded.k, padded.v, padded.lengths_q, padded.lengths_k};
  if (!padded.packed()) {
    forward_dense(args, batch, out, lse);
    return {out, lse};
  }
  const Sizes q = padded.q.sizes();
  const Tensor padded_out =
      empty({q[0], q[1], q[2], args.head_dim_v()}, args.q, accumulator_type(args.q));
  const Tensor padded_lse = empty({q[0], q[2], q[1]}, args.q, accumulator_type(args.q));
  forward_dense(args, batch, padded_out, padded_lse);
  padded.unpad_query(out, padded_out, 0);
  padded.unpad_lse(lse, padded_lse);
  return {out, lse};
}

Gradients backward_padded(const AttentionArgs& args, const BackwardArgs& grad) {
  const SharedGradients shared(args, grad);
  const Tensor dq = zeros_like(args.q), dk = zeros_like(args.k), dv = zeros_like(args.v);
  if (args.q.numel() > 0 && args.k.numel() > 0) {
    const PaddedProblem padded(args);
    const DenseBatch batch{0, padded.q, padded.k, padded.v, padded.lengths_q, padded.lengths_k};
    OptionalTensor dlse;
    if (grad.dlse) dlse = padded.pad_lse(*grad.dlse, 0);
    const Tensor padded_dq = empty_like(padded.q), padded_dk = empty_like(padded.k),
                 padded_dv = empty_like(padded.v);
    backward_dense(args, batch,
                   {padded.pad_query(grad.dout), padded.pad_query(grad.out),
                    padded.pad_lse(grad.lse, kInfinity), dlse},
                   {padded_dq, padded_dk, padded_dv, shared.dbias, shared.dsinks});
    padded.unpad_query(dq, padded_dq, 0);
    padded.unpad_key(dk, padded_dk);
    padded.unpad_key(dv, padded_dv);
  }
  return {dq, dk, dv, shared.bias_gradient(args), shared.sinks_gradient(args)};
}

ForwardResult forward(const AttentionArgs& args) {
  return args.q.is_cpu() ? forward_by_sequence(args) : forward_padded(args);
}

Gradients backward(const AttentionArgs& args, const BackwardArgs& grad) {
  return args.q.is_cpu() ? backward_by_sequence(args, grad) : backward_padded(args, grad);
}

}  // namespace anyflash::math
