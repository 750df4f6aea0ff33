// Attention over one dense batch, composed from plain operators in chunks of query rows: all
// features, any device, no host sync.
#pragma once

#include "routes/dense_mask.h"
#include "routes/philox.h"

namespace anyflash {

// What the backward has beside the batch: rows that belong to no sequence hold dout 0, lse +inf,
// dlse 0.
struct DenseGrad {
  Tensor dout;          // (n, rows, heads, head_dim_v)
  Tensor out;           // the same
  Tensor lse;           // (n, heads, rows)
  OptionalTensor dlse;  // the same
};

// Where gradients go. dq, dk, dv are overwritten, dbias and dsinks are added to.
struct DenseGradResult {
  Tensor dq, dk, dv;      // shapes of q, k, v
  OptionalTensor dbias;   // 4-D, bias's broadcast shape
  OptionalTensor dsinks;  // (heads)
};

class DenseAttention {
 public:
  DenseAttention(const AttentionArgs& args, const DenseBatch& batch);

  // out (n, rows, heads, head_dim_v) of any type and strides, lse (n, heads, rows)
  void forward(const Tensor& out, const Tensor& lse) const;
  void backward(const DenseGrad& grad, const DenseGradResult& result) const;

 private:
  struct Scores {
    Tensor values;        // (n, heads, rows, keys), hidden ones at -inf
    OptionalTensor tanh;  // of the soft cap: its derivative is 1 - tanh^2
  };

  Tensor grouped_rows(const Tensor& x, const Chunk& chunk) const;
  void store_rows(const Tensor& destination, const Chunk& chunk, const Tensor& x) const;
  Tensor chunk_keys(const Tensor& x, const Chunk& chunk) const;
  Tensor by_head(const Tensor& x, const Chunk& chunk, int64_t columns) const;
  Tensor by_group(const Tensor& x, const Chunk& chunk, int64_t columns) const;

  Scores scores(const Tensor& queries, const Chunk& chunk, bool keep_tanh) const;
  Tensor alibi(const Chunk& chunk) const;
  Tensor lse_rows(const Tensor& lse, const Chunk& chunk) const;
  OptionalTensor dropped(const Chunk& chunk) const;
  Tensor reference_of(const Tensor& row_max) const;
  Tensor weight_of_far_rows(const Tensor& far, const Tensor& p, const Tensor& reference,
                            const Tensor& lse) const;
  void forward_chunk(const Chunk& chunk, const Tensor& out, const Tensor& lse) const;
  void backward_chunk(const Chunk& chunk, const DenseGrad& grad, const DenseGradResult& result,
                      const Tensor& sum_dk, const Tensor& sum_dv) const;

  const AttentionArgs& args_;
  const DenseBatch& batch_;
  const ScalarType dtype_;  // of everything computed here
  const int64_t sequences_, heads_, heads_k_, group_;
  const DenseMask mask_;
  Tensor keys_;            // (n * heads_k, keys, head_dim)
  Tensor values_;          // (n * heads_k, keys, head_dim_v)
  OptionalTensor slopes_;  // (n or 1, heads, 1, 1)
  OptionalTensor bias_;    // (n or 1, heads or 1, rows or 1, keys or 1)
  OptionalTensor sinks_;   // (1, heads, 1, 1)
  std::optional<DropoutMask> dropout_;
};

}  // namespace anyflash
