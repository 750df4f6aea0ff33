// A problem as dense batches. On the CPU sequence by sequence, with exact lengths; elsewhere
// padded, so that no length has to come to the host.
#pragma once

#include <functional>

#include "attention/arguments.h"
#include "routes/dense_mask.h"
#include "routes/runs.h"

namespace anyflash {

// What fills out (n, rows, heads, head_dim_v) and lse (n, heads, rows) of a batch; rows that belong
// to no sequence may hold anything.
using ForwardBatch = std::function<void(const AttentionArgs& args, const DenseBatch& batch,
                                        const Tensor& out, const Tensor& lse)>;

// A run, whose lengths are plain numbers, as a batch.
DenseBatch dense_batch(const AttentionArgs& args, const Run& run);

// out and lse of a problem, batch by batch.
ForwardResult forward_in_batches(const AttentionArgs& args, const ForwardBatch& forward);

// Calls compute(part, begin, size) for parts of a batch that are small enough for a chunk of 16
// rows: the sequences [begin, begin + size) of it.
void for_each_part(
    const DenseBatch& batch,
    const std::function<void(const DenseBatch& part, int64_t begin, int64_t size)>& compute);

// `x` of a batch reduced to its sequences [begin, begin + count).
OptionalTensor sequences_of(const OptionalTensor& x, int64_t begin, int64_t count);

}  // namespace anyflash
