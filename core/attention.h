// One attention call as data: what was asked, what was decided, what is written. Shapes and
// semantics: csrc/schemas.def.
#pragma once

#include <algorithm>

#include "core/describe.h"
#include "core/dispatch.h"
#include "core/tensor_view.h"

namespace anyflash {

constexpr int64_t kMaxHeadDim = 512;

// The numbers of a call.
struct AttentionOptions {
  int64_t max_seqlen_q = 0;  // dense: q's own length, whatever was given
  int64_t max_seqlen_k = 0;  // dense: k's; paged: the capacity
  double dropout_p = 0.0;
  double softmax_scale = 1.0;
  double softcap = 0.0;
  int64_t window_left = -1;   // -1: unbounded
  int64_t window_right = -1;  // causal is 0
  bool return_lse = true;     // false: a route may return NaN for the log-sum-exp

  bool purely_causal() const { return window_left < 0 && window_right == 0; }
};

struct AttentionCall {
  TensorView q;  // (batch, seqlen_q, heads, head_dim) or (total_q, heads, head_dim)
  TensorView k;
  TensorView v;
  TensorView cu_seqlens_q;
  TensorView cu_seqlens_k;
  TensorView seqused_k;
  TensorView leftpad_k;
  TensorView block_table;
  TensorView alibi_slopes;
  TensorView bias;
  TensorView sinks;
  TensorView rng_state;
  AttentionOptions options;

  // max_seqlen is a bound, however generous: no sequence is longer than all together.
  int64_t longest_q() const {
    return packed() ? std::min(options.max_seqlen_q, q.size(0)) : options.max_seqlen_q;
  }
  int64_t longest_k() const {
    return packed() && !paged() ? std::min(options.max_seqlen_k, k.size(0)) : options.max_seqlen_k;
  }
  bool packed() const { return cu_seqlens_q.given(); }
  bool paged() const { return block_table.given(); }
  int64_t batch() const { return packed() ? cu_seqlens_q.size(0) - 1 : q.size(0); }
  int64_t heads() const { return q.size(-2); }
  int64_t heads_k() const { return k.size(-2); }
  int64_t head_dim() const { return q.size(-1); }
  int64_t head_dim_v() const { return v.size(-1); }
};

// What the backward has beside the forward's arguments.
struct BackwardCall {
  TensorView dout;  // out's shape
  TensorView out;
  TensorView lse;   // (batch, heads, seqlen_q) or (heads, total_q)
  TensorView dlse;  // lse's shape
  bool deterministic = false;
  bool bias_requires_grad = false;
  bool sinks_requires_grad = false;
};

// What a kernel writes: out and lse, or the gradients.
struct AttentionResults {
  TensorView out, lse;
  TensorView dq, dk, dv;
  TensorView dbias;   // bias' shape, fp32, zeroed; if wanted
  TensorView dsinks;  // (heads), fp32; if wanted
  void* workspace = nullptr;
};

// Lengths and windows as AttentionOptions promises them: dense and paged lengths from the shapes, a
// window that reaches every key unbounded, causal as window_right = 0. Comes before the checks,
// which read the lengths.
void normalise(AttentionCall& call, bool causal);

// Refuses what cannot be computed, before a route sees it: shapes, dtypes, devices, memory and
// options; values of index tensors where TensorView::host has them.
void check_forward(const AttentionCall& call);
void check_backward(const AttentionCall& call, const BackwardCall& grad);

Problem describe_forward(const AttentionCall& call, const Caller& caller);
Problem describe_backward(const AttentionCall& call, const BackwardCall& grad,
                          const Caller& caller);

// Runs the kernel. `call.bias` is not fp64 and `call.sinks` is fp32: a caller converts them, and
// aligns rows for a GPU. `where` is a stream or a CpuThreads.
void run_forward(const Instance& instance, const AttentionCall& call,
                 const AttentionResults& results, void* where);
void run_backward(const Instance& instance, const AttentionCall& call, const BackwardCall& grad,
                  const AttentionResults& results, void* where);

// Bytes of AttentionResults::workspace, 16-byte aligned, for this forward or backward.
int64_t workspace_bytes(const Instance& instance, const AttentionCall& call);
int64_t workspace_bytes(const Instance& instance, const AttentionCall& call,
                        const BackwardCall& grad, const AttentionResults& results);

}  // namespace anyflash
