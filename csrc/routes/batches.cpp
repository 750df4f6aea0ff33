#include "routes/batches.h"

#include <algorithm>
#include <limits>

#include "attention/results.h"
#include "routes/padded.h"
#include "routes/philox.h"

namespace anyflash {

namespace {

// Scores of this many elements are one chunk (dense_mask.cpp) at most; batches are cut so that a
// chunk of 16 rows stays below it.
constexpr int64_t kMaxScores = int64_t{1} << 24;

ForwardResult forward_by_sequence(const AttentionArgs& args, const ForwardBatch& forward) {
  const Tensor out = new_out(args);
  const Tensor lse = new_lse(args);
  clear_unowned_rows(args, out, lse);
  for (const Run& run : split_runs(args)) {
    const DenseBatch batch = dense_batch(args, run);
    forward(args, batch, query_rows(args, run, out), lse_rows(args, run, lse));
  }
  return {out, lse};
}

ForwardResult forward_padded(const AttentionArgs& args, const ForwardBatch& forward) {
  const Tensor out = new_out(args);
  const Tensor lse = new_lse(args);
  if (args.batch() == 0) {
    fill_(out, 0);
    fill_(lse, std::numeric_limits<double>::infinity());
    return {out, lse};
  }
  if (out.numel() == 0 && lse.numel() == 0) return {out, lse};
  const PaddedProblem padded(args);
  const DenseBatch batch{0, padded.q, padded.k, padded.v, padded.lengths_q, padded.lengths_k};
  if (!padded.packed()) {
    forward(args, batch, out, lse);
    return {out, lse};
  }
  const Sizes q = padded.q.sizes();
  const Tensor padded_out =
      empty({q[0], q[1], q[2], args.head_dim_v()}, args.q, accumulator_type(args.q));
  const Tensor padded_lse = empty({q[0], q[2], q[1]}, args.q, accumulator_type(args.q));
  forward(args, batch, padded_out, padded_lse);
  padded.unpad_query(out, padded_out, 0);
  padded.unpad_lse(lse, padded_lse);
  return {out, lse};
}

}  // namespace

DenseBatch dense_batch(const AttentionArgs& args, const Run& run) {
  return {run.sequence,
          query_rows(args, run, args.q),
          key_rows(args, run, args.k),
          key_rows(args, run, args.v),
          std::nullopt,
          std::nullopt};
}

ForwardResult forward_in_batches(const AttentionArgs& args, const ForwardBatch& forward) {
  return args.q.is_cpu() ? forward_by_sequence(args, forward) : forward_padded(args, forward);
}

OptionalTensor sequences_of(const OptionalTensor& x, int64_t begin, int64_t count) {
  return x ? OptionalTensor(narrow(*x, 0, begin, count)) : x;
}

void for_each_part(
    const DenseBatch& batch,
    const std::function<void(const DenseBatch& part, int64_t begin, int64_t size)>& compute) {
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

}  // namespace anyflash
