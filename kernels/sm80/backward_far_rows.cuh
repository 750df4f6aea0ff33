// Rows whose log-sum-exp is far from 0, as a bias makes them that all but hides every key: one
// float says where their logits lie, and not how much their weights add up to. Both are found
// again, a warp to a row, and kept apart:
//
//   P = 2^((score - reference) exponent - lse)
#pragma once

#include "kernels/sm80/backward_rows.cuh"
#include "kernels/sm80/gradients.cuh"

namespace anyflash::sm80 {

template <typename T>
class FarRow {
 public:
  __device__ __forceinline__ FarRow(const BackwardArguments& a, const Sequence& s, int32_t head,
                                    int32_t row)
      : a_(a), p_(a.attention), s_(s), head_(head), row_(row) {}

  // The reference; `lse` becomes what belongs to it.
  __device__ __forceinline__ float find(float& lse) const {
    const IntervalMask<int32_t> mask{s_.seqlen_q, s_.seqlen_k, a_.score.window_left,
                                     a_.score.window_right};
    const HeadNumbers numbers = HeadNumbers::of(p_, a_.score, s_.index, head_);
    const bool packed_q = p_.cu_seqlens_q != nullptr, packed_k = p_.cu_seqlens_k != nullptr;
    const Columns query(strided_rows(p_.q, packed_q, s_.index, s_.first_q, head_)[row_], p_);
    const StridedRows keys = strided_rows(p_.k, packed_k, s_.index, s_.first_k,
                                          head_ / (int32_t(p_.heads) / int32_t(p_.heads_k)));
    const int32_t end = smaller(mask.kv_end(row_), s_.seqlen_k);
    float max = a_.score.floor, sum = 0;
    for (int32_t key = larger(mask.kv_begin(row_), 0); key < end; ++key) {
      const float x = score(query * Columns(keys[key], p_), numbers, mask, key);
      if (x > max) {
        sum *= ptx::ex2((max - x) * a_.score.exponent);
        max = x;
      }
      sum += ptx::ex2((x - max) * a_.score.exponent);
    }
    const float given = lse;
    lse = infinity();  // of a row without keys
    if (sum == 0) return 0;
    const float origin = logit(a_.score, max), sink = p_.sinks ? p_.sinks[head_] : -infinity();
    const float sink_exponent = (sink - origin) * kLog2e;
    // Beyond some 2^100 the keys are nothing beside the sink.
    const float own = sink_exponent > 100 ? sink_exponent : ptx::lg2(sum + ptx::ex2(sink_exponent));
    // Nor are they beside other keys that a larger log-sum-exp, merged from several calls, has in
    // it.
    if (origin + own * kLn2 >= given - fabsf(given) * 0x1p-12f) lse = own;
    return max;
  }

 private:
  // A lane's columns of a row.
  struct Columns {
    Words16 words{};

    __device__ __forceinline__ Columns(const char* row, const AttentionParams& p) {
      const int32_t lane = int32_t(threadIdx.x) % kWarpThreads;
      if (8 * lane < p.head_dim) words = ptx::load_16(row + 16 * lane);
    }
    __device__ __forceinline__ float operator*(const Columns& other) const {
      float sum = 0;
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        const uint32_t x = words.w[i], y = other.words.w[i];
        sum += to_fp32(T{uint16_t(x)}) * to_fp32(T{uint16_t(y)});
        sum += to_fp32(T{uint16_t(x >> 16)}) * to_fp32(T{uint16_t(y >> 16)});
      }
      return warp_sum(sum);
    }
  };

  // As a tile has it.
  __device__ __forceinline__ float score(float product, const HeadNumbers& numbers,
                                         const IntervalMask<int32_t>& mask, int32_t key) const {
    float x[1][1][4] = {{{product, 0, 0, 0}}};
    modify_scores<true>(x, a_.score);
    if (p_.alibi_slopes) {
      const int32_t diagonal = row_ + mask.shift();
      add_alibi(x, key, {numbers.slope, 0}, {diagonal, 0}, a_.score.alibi_by_key);
    }
    add_bias(x, p_, a_.score, numbers.bias, row_, key, row_ + 1, key + 1);
    return x[0][0][0];
  }

  const BackwardArguments& a_;
  const AttentionParams& p_;
  const Sequence& s_;
  const int32_t head_;
  const int32_t row_;
};

// A block has kRowTile rows of one head. prepare_kernel has written their numbers.
template <typename T>
__global__ void __launch_bounds__(kBackwardThreads) far_rows_kernel(const BackwardArguments a) {
  const AttentionParams& p = a.attention;
  const Block block = Block::of<kRowTile>(a);
  const Sequence& s = block.sequence;
  if (!block.has_rows(a)) return;
  const int32_t warp = int32_t(threadIdx.x) / kWarpThreads;
  const int32_t lane = int32_t(threadIdx.x) % kWarpThreads, head = block.first_head;
  const int32_t rows = s.index == p.batch ? 0 : s.seqlen_q;
  const int64_t first = first_number(a, s, head) + block.row_begin;
  for (int32_t r = warp; r < kRowTile; r += kBackwardWarps) {
    const int32_t row = block.row_begin + r;
    float reference = 0;
    if (row < rows) {
      float lse = statistics_of(p, p.lse, s, head)[row];
      if (is_far(lse)) {
        reference = FarRow<T>(a, s, head, row).find(lse);
        if (lane == 0) a.rows[first + r].lse = lse;
      }
    }
    if (lane == 0) a.references[first + r] = reference;
  }
}

}  // namespace anyflash::sm80
