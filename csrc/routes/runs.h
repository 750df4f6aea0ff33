// A CPU problem as dense batches: lengths are read on the host, and neighbouring sequences of equal
// lengths are one batch.
#pragma once

#include <vector>

#include "attention/arguments.h"
#include "attention/results.h"
#include "stable/aten.h"

namespace anyflash {

// Rows of consecutive sequences: the n-th sequence begins at storage row begin + n * step (dense
// storage: row `begin` of batch entry n).
struct Span {
  int64_t begin, step, length;
};

struct Run {
  int64_t sequence, count;  // sequences [sequence, sequence + count)
  Span q;
  Span k;  // those that queries may see; paged: always one sequence
};

// Every sequence with at least one query, in order.
std::vector<Run> split_runs(const AttentionArgs& args);

// The run's part of a tensor laid out like q: (count, length, heads, n).
Tensor query_rows(const AttentionArgs& args, const Run& run, const Tensor& x);
// The run's part of a tensor laid out like k: (count, length, heads_k, n); paged: gathered from its
// pages.
Tensor key_rows(const AttentionArgs& args, const Run& run, const Tensor& x);
// The run's part of a log-sum-exp: (count, heads, length).
Tensor lse_rows(const AttentionArgs& args, const Run& run, const Tensor& lse);
// The run's part of args.bias, dimensions that broadcast left at 1: (count or 1, heads or 1,
// length_q or 1, length_k or 1).
Tensor bias_block(const AttentionArgs& args, const Run& run, const Tensor& bias);

// Packed storage may hold rows after the last sequence: out 0, lse +inf.
void clear_unowned_rows(const AttentionArgs& args, const Tensor& out, const Tensor& lse);

}  // namespace anyflash
