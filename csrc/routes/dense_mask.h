// One dense batch, and which keys its rows see, a chunk of rows at a time. Any device, no host
// sync.
#pragma once

#include <vector>

#include "attention/arguments.h"
#include "kernels/masks.h"
#include "stable/aten.h"

namespace anyflash {

// Sequences [sequence, sequence + q.size(0)) of a problem. Where their lengths differ they are
// padded: with rows and keys of zeros, and the true lengths in tensors, which stay on their device.
struct DenseBatch {
  int64_t sequence;
  Tensor q;                  // (n, rows, heads, head_dim)
  Tensor k;                  // (n, keys, heads_k, head_dim)
  Tensor v;                  // (n, keys, heads_k, head_dim_v)
  OptionalTensor lengths_q;  // (n), unset: every length is q.size(1)
  OptionalTensor lengths_k;  // (n), unset: every length is k.size(1)
};

// Rows against the keys that any of them sees.
struct Chunk {
  int64_t row, rows;
  int64_t key, keys;
};

class DenseMask {
 public:
  DenseMask(const AttentionArgs& args, const DenseBatch& batch);

  // Rows at multiples of a dropout tile, as many as keep a chunk's scores small.
  std::vector<Chunk> chunks() const;
  // Whether any row may not see every key.
  bool hides() const;
  // The same mask as PyTorch's causal one, which knows one length.
  bool is_square_causal() const;
  // kernels/masks.h for tensors of lengths: which keys a row does not see, broadcastable to (n,
  // heads, rows, keys).
  Tensor hidden(const Chunk& chunk) const;
  // The key that each row is aligned with, row + seqlen_k - seqlen_q: (n or 1, 1, rows, 1).
  Tensor diagonal(const Chunk& chunk) const;
  // The chunk's keys by number: (keys).
  Tensor keys(const Chunk& chunk) const { return numbers(chunk.key, chunk.keys); }

 private:
  Tensor per_sequence(const Tensor& x) const;
  Tensor numbers(int64_t begin, int64_t count) const;

  const AttentionArgs& args_;
  const DenseBatch& batch_;
  const ScalarType dtype_;            // of positions: exact up to 2^24
  const IntervalMask<int64_t> mask_;  // exact where no lengths are given
};

// The chunk's part of a four-dimensional bias, dimensions that broadcast left at 1.
Tensor bias_chunk(const Tensor& bias, const Chunk& chunk);

}  // namespace anyflash
