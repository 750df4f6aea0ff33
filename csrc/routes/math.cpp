// Attention composed from plain operators (dense.h): every feature, on any device.
#include <limits>

#include "attention/results.h"
#include "routes/batches.h"
#include "routes/dense.h"
#include "routes/padded.h"
#include "routes/routes.h"
#include "routes/runs.h"

namespace anyflash::math {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

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

Gradients backward_by_sequence(const AttentionArgs& args, const BackwardArgs& grad) {
  const SharedGradients shared(args, grad);
  const Tensor dq = zeros_like(args.q), dk = zeros_like(args.k), dv = zeros_like(args.v);
  for (const Run& run : split_runs(args)) {
    if (run.k.length == 0) continue;
    const DenseBatch batch = dense_batch(args, run);
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

Gradients backward_padded(const AttentionArgs& args, const BackwardArgs& grad) {
  const SharedGradients shared(args, grad);
  const Tensor dq = zeros_like(args.q), dk = zeros_like(args.k), dv = zeros_like(args.v);
  if (args.batch() > 0 && args.q.numel() > 0 && args.k.numel() > 0) {
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

ForwardResult forward(const AttentionArgs& args) { return forward_in_batches(args, forward_dense); }

Gradients backward(const AttentionArgs& args, const BackwardArgs& grad) {
  return args.q.is_cpu() ? backward_by_sequence(args, grad) : backward_padded(args, grad);
}

}  // namespace anyflash::math
