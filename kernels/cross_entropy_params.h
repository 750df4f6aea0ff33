// Arguments of the cross entropy kernels. Per row, with x = logit_scale * logits, s = smoothing,
// n = total_classes and the label counted from class_start:
//
//   lse    = log(sum(exp(x)))
//   loss   = s (lse - sum(x) / n) + z_loss, and + (1 - s)(lse - x[label]) where label is a column
//   z_loss = lse_square_scale lse^2
//   dx     = dloss ((1 + 2 lse_square_scale lse) exp(x - lse) - s / n), and - dloss (1 - s) at
//   label
//
// Where the columns are a part of the classes (vocab < total_classes), the forward leaves lse and
// z_loss out of the loss: such losses add up over the parts, and the lse of all classes comes on
// top; the backward reads that one. An ignored row has loss 0 and gradient 0.
#pragma once

#include "kernels/portable.h"

namespace anyflash {

struct CrossEntropyParams {
  const void* logits;      // (rows, vocab)
  const int64_t* labels;   // (rows)
  const float* given_lse;  // (rows): the forward takes it as it is, or null; backward: the lse
  float* lse;              // (rows); forward
  float* losses;           // (rows); forward
  float* z_losses;         // (rows); forward
  const float* dlosses;    // (rows); backward
  void* dlogits;           // (rows, vocab), may be `logits`; backward
  float* workspace;        // cross_entropy::workspace_floats(rows, vocab); forward
  int64_t rows;
  int64_t vocab;
  int64_t logits_row_stride;
  int64_t dlogits_row_stride;
  int64_t dlosses_stride;
  int64_t ignore_index;
  int64_t class_start;
  int64_t total_classes;
  float smoothing;
  float logit_scale;
  float lse_square_scale;
};

namespace cross_entropy {

// Columns of a row that one thread takes at a time. The cut depends on the shape alone, so that
// sums come out the same for any number of threads.
constexpr int64_t kChunk = 1 << 14;

ANYFLASH_HOST_DEVICE constexpr int64_t num_chunks(int64_t vocab) {
  return (vocab + kChunk - 1) / kChunk;
}

// Three numbers per chunk of a row, where a row has several.
ANYFLASH_HOST_DEVICE constexpr int64_t workspace_floats(int64_t rows, int64_t vocab) {
  return num_chunks(vocab) > 1 ? 3 * rows * num_chunks(vocab) : 0;
}

}  // namespace cross_entropy
}  // namespace anyflash
