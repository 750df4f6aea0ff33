// Attention as the operators see it: one value per call, read by every back end. The core sees the
// same as views (core/attention.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "core/attention.h"
#include "stable/aten.h"

namespace anyflash {

// One attention problem. Its options are normalised by prepare(). Shapes and semantics:
// schemas.def.
struct AttentionArgs : AttentionOptions {
  Tensor q;  // (batch, seqlen_q, heads, head_dim) or (total_q, heads, head_dim) with cu_seqlens_q
  Tensor k;  // (batch, seqlen_k, heads_k, head_dim), (total_k, heads_k, head_dim) or, paged,
             // (num_blocks, page_size, heads_k, head_dim)
  Tensor v;  // k's shape with head_dim_v
  OptionalTensor cu_seqlens_q{};  // (batch + 1) int32
  OptionalTensor cu_seqlens_k{};  // (batch + 1) int32
  OptionalTensor seqused_k{};     // (batch) int32
  OptionalTensor leftpad_k{};     // (batch) int32
  OptionalTensor block_table{};   // (batch, max_blocks) int32
  OptionalTensor alibi_slopes{};  // (heads) or (batch, heads) fp32
  OptionalTensor
      bias{};  // broadcastable to (batch, heads, max_seqlen_q, max_seqlen_k), float or bool
  OptionalTensor sinks{};      // (heads)
  OptionalTensor rng_state{};  // (2) int64: seed, offset

  // max_seqlen is a bound, however generous: no sequence is longer than all together.
  int64_t longest_q() const { return packed() ? std::min(max_seqlen_q, q.size(0)) : max_seqlen_q; }
  int64_t longest_k() const {
    return packed() && !paged() ? std::min(max_seqlen_k, k.size(0)) : max_seqlen_k;
  }

  bool packed() const { return cu_seqlens_q.has_value(); }
  bool paged() const { return block_table.has_value(); }
  int64_t batch() const { return packed() ? cu_seqlens_q->size(0) - 1 : q.size(0); }
  // Whether there is no score to compute.
  bool empty() const {
    return batch() == 0 || max_seqlen_k == 0 || q.numel() == 0 || k.numel() == 0;
  }
  int64_t heads() const { return q.size(q.dim() - 2); }
  int64_t heads_k() const { return k.size(k.dim() - 2); }
  int64_t head_dim() const { return q.size(q.dim() - 1); }
  int64_t head_dim_v() const { return v.size(v.dim() - 1); }
};

// What the backward has beside the forward's arguments.
struct BackwardArgs {
  Tensor dout;          // out's shape
  Tensor out;           // given, not recomputed: ring attention passes a merged one
  Tensor lse;           // (batch, heads, seqlen_q) or (heads, total_q)
  OptionalTensor dlse;  // lse's shape
  bool deterministic = false;
  bool bias_requires_grad = false;
  bool sinks_requires_grad = false;
};

struct Gradients {
  Tensor dq, dk, dv;
  OptionalTensor dbias, dsinks;  // unset unless asked for
};

using ForwardResult = std::pair<Tensor, Tensor>;  // out, lse

}  // namespace anyflash
