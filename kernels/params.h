// Arguments of the kernel families: plain data, pointers of the kernel's device, strides in
// elements.
#pragma once

#include "kernels/lengths.h"

namespace anyflash {

enum class Activation : int32_t {
  gelu_tanh = 0,
  gelu_erf = 1,
  relu = 2,
  squared_relu = 3,
  silu_gate = 4,  // u * silu(g): u the first half of the input's columns, g the second
};

constexpr int32_t kNumActivations = 5;

// y = activation(x + bias), and backwards dx, dbias from dy. All tensors have the instance's dtype;
// the arithmetic is fp32. in_cols = cols, for silu_gate 2 * cols. Columns are contiguous, rows may
// have any stride. Nothing may overlap.
struct BiasActivationParams {
  const void* x;     // (rows, in_cols)
  const void* bias;  // (in_cols), or null
  void* y;           // (rows, cols); forward
  const void* dy;    // (rows, cols); backward
  void* dx;          // (rows, in_cols); backward
  void* dbias;       // (in_cols), or null if not wanted; backward
  void* workspace;   // anyflash_bias_activation_workspace() bytes, 16-byte aligned; backward with
                     // dbias
  int64_t rows;
  int64_t cols;
  int64_t x_row_stride;
  int64_t y_row_stride;
  int64_t dy_row_stride;
  int64_t dx_row_stride;
  Activation activation;
};

// A tensor of rows: element (sequence, row, head, column) lies at
// data[sequence * batch_stride + row * row_stride + head * head_stride + column]. Packed sequences
// follow each other along the rows (batch_stride is not read); paged keys have one page per
// batch_stride.
struct Rows {
  void* data;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
};

// One number per query row, (sequence, head, row), rows contiguous, fp32; packed: row counts
// through all sequences and batch_stride is not read.
struct RowStatistics {
  float* data;
  int64_t batch_stride;
  int64_t head_stride;
};

// A log-sum-exp from which on its rounding is no longer small beside the logarithm of a sum of
// weights; +inf is that of a row without keys.
ANYFLASH_HOST_DEVICE bool is_far(float lse) {
  return lse <= -16384.0f || (lse >= 16384.0f && lse <= 3.4028235e38f);
}

enum class BiasType : int32_t { none, fp16, bf16, fp32, boolean };  // boolean: 0 hides a key

ANYFLASH_HOST_DEVICE constexpr int32_t bytes_of(BiasType type) {
  return type == BiasType::fp32 ? 4 : type == BiasType::boolean ? 1 : 2;
}

// Attention as csrc/schemas.def defines it. Rows in q, k, v, out and their gradients have the
// instance's dtype. Pointers without "may be null" must be set where there is anything to compute.
struct AttentionParams {
  Rows q;             // head_dim columns
  Rows k;             // head_dim columns
  Rows v;             // head_dim_v columns
  Rows out;           // head_dim_v columns; written by the forward, read by the backward
  RowStatistics lse;  // the same; +inf for a row without keys

  const int32_t* cu_seqlens_q;  // (batch + 1), or null: dense
  const int32_t* cu_seqlens_k;  // (batch + 1), or null: dense or paged. What these three say
                                // about a sequence's keys: lengths.h
  const int32_t* seqused_k;     // (batch), may be null
  const int32_t* leftpad_k;     // (batch), may be null
  const int32_t* block_table;   // (batch, block_table_stride) page numbers; null: not paged
  int64_t block_table_stride;
  int64_t page_size;

  int64_t batch;
  int64_t heads;
  int64_t heads_k;
  int64_t head_dim;
  int64_t head_dim_v;
  int64_t seqlen_q;  // dense: of every sequence; packed: of the longest, or more
  int64_t seqlen_k;  // dense: stored keys; paged: capacity; packed: of the longest, or more
  int64_t total_q;   // packed: rows of q, those behind the last sequence too
  int64_t total_k;   // the same of k

  double softmax_scale;
  double softcap;        // 0: none
  int64_t window_left;   // negative: unbounded
  int64_t window_right;  // causal: 0

  const float* alibi_slopes;  // (batch or 1, heads), heads contiguous; may be null
  int64_t alibi_batch_stride;
  const float* sinks;  // (heads), may be null

  const void* bias;  // null with BiasType::none
  BiasType bias_type;
  int64_t bias_stride[4];  // (batch, heads, seqlen_q, seqlen_k), 0 where it broadcasts

  double dropout_p;          // 0: none; near 1 a float would lose what 1 - dropout_p is
  const int64_t* rng_state;  // (seed, offset); null without dropout

  void* workspace;  // anyflash_attention_workspace() bytes, 16-byte aligned; may be null for 0

  // Backward alone.
  bool deterministic;  // the same bits every time, on a GPU too
  Rows dout;           // head_dim_v columns
  RowStatistics dlse;  // data may be null
  Rows dq;             // like q, every row is written
  Rows dk;             // like k; only rows of used keys are written
  Rows dv;             // like v; the same
  float* dbias;        // null if not wanted; strides of a contiguous tensor of bias' own shape,
  int64_t dbias_stride[4];  // 0 where it broadcasts; zeroed by the caller
  float* dsinks;            // (heads), null if not wanted; written
};

ANYFLASH_HOST_DEVICE KeyLengths key_lengths(const AttentionParams& p) {
  return {p.cu_seqlens_k, p.seqused_k, p.leftpad_k, p.block_table != nullptr, p.seqlen_k};
}

// What a call with a key/value cache does before attention: token `row` of k and v goes to position
// cache_seqlens[sequence] + row of the sequence's cache, k turned by the angles of that position if
// rotary tables are given, and so is q, into q_rotated. All tensors have the instance's dtype; the
// arithmetic is fp32. Tokens without a place in the cache are left out.
struct KvcacheAppendParams {
  Rows k;        // (batch, seqlen_new, heads_k, head_dim)
  Rows v;        // (batch, seqlen_new, heads_k, head_dim_v)
  Rows k_cache;  // (num_pages, page_size, heads_k, head_dim); a cache without pages has one per
  Rows v_cache;  // sequence, of its capacity
  const int32_t* cache_seqlens;  // (batch)
  int32_t* seqused_k;            // (batch) cache_seqlens + seqlen_new, written; may be null
  const int32_t* block_table;    // (batch, pages_per_sequence) page numbers; null: its own page
  int64_t block_table_stride;
  int64_t pages_per_sequence;
  int64_t page_size;
  int64_t num_pages;

  int64_t batch;
  int64_t seqlen_new;
  int64_t heads_k;
  int64_t head_dim;
  int64_t head_dim_v;

  const void* rotary_cos;  // (seqlen_rotary, rotary_dim / 2), or null: no rotation
  const void* rotary_sin;
  int64_t rotary_cos_stride;
  int64_t rotary_sin_stride;
  int64_t seqlen_rotary;
  int64_t rotary_dim;  // the columns behind it are copied
  bool interleaved;    // pairs are neighbours, else half of rotary_dim apart

  // With rotary tables alone.
  Rows q;          // (batch, seqlen_q, heads, head_dim)
  Rows q_rotated;  // the same
  int64_t seqlen_q;
  int64_t heads;
  bool q_positions_move;  // row i of q stands at cache_seqlens + i, else all at cache_seqlens
};

// torch_parallel_for's signature: calls body(part_begin, part_end, context) for parts that cover
// [begin, end), at most one per thread. 0 is success.
using RangeBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain_size, RangeBody body,
                                void* context);

// Where a CPU kernel runs, as a stream is where a CUDA kernel runs.
struct CpuThreads {
  ParallelFor parallel_for;
  int32_t num_threads;
};

}  // namespace anyflash
