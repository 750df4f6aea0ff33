// The route `kernel`, what it has in common on all devices: tensors become AttentionParams.
#pragma once

#include "attention.h"
#include "kernels/params.h"
#include "stable/aten.h"

namespace anyflash {

// (batch, rows, heads, columns), paged the same, or packed (rows, heads, columns).
Rows rows_of(const Tensor& x);

// (batch, heads, rows) or, packed, (heads, rows).
RowStatistics statistics_of(const Tensor& x);

// Strides that let a dimension of 1 broadcast, of at most four.
void copy_broadcast_strides(const Tensor& x, int64_t* strides);

// The parameters that forward and backward share, and what had to be converted for them.
class AttentionInputs {
 public:
  // q, k, v: the arguments' own, with rows that the kernel can read and columns that it may have
  // more of.
  AttentionInputs(const AttentionArgs& args, const Tensor& q, const Tensor& k, const Tensor& v);

  AttentionParams params{};

 private:
  void set_sequences(const AttentionArgs& args);
  void set_scores(const AttentionArgs& args);
  void set_bias(const AttentionArgs& args);

  Tensor q_, k_, v_;
  OptionalTensor cu_seqlens_q_, cu_seqlens_k_, seqused_k_, leftpad_k_, block_table_;
  OptionalTensor alibi_slopes_, bias_, sinks_;
};

// A result in the layout that the operators promise, and the tensor that the kernel writes: the
// same, or one with other strides and perhaps more columns.
class KernelOutput {
 public:
  KernelOutput(const Tensor& promised, const Tensor& written)
      : promised_(promised), written_(written) {}
  const Tensor& written() const { return written_; }
  Tensor finish() const;

 private:
  Tensor promised_, written_;
};

}  // namespace anyflash
