// Rows whose log-sum-exp is far from 0, as a bias makes them that all but hides every key: one
// float says where their logits lie, and not how much their weights add up to. Both are found
// again, a warp to a row, and kept apart:
//
//   P = 2^((score - reference) exponent - lse)
#pragma once

#include "kernels/sm80/backward_rows.cuh"
#include "kernels/sm80/gradients.cuh"

namespace anyflash::sm80 {

struct FarNumbers {
  float reference;  // the row's largest score
  float lse;        // in powers of two, counted from there
  float sink;       // the exponent of the sink's probability
};

template <typename T>
class FarRow {
 public:
  __device__ __forceinline__ FarRow(const BackwardArguments& a, const Sequence& s, int32_t head,
                                    int32_t row)
      : a_(a),
        p_(a.attention),
        s_(s),
        head_(head),
        row_(row),
        mask_{s.seqlen_q, s.seqlen_k, a.score.window_left, a.score.window_right} {}

  // `given`: the log-sum-exp of the forward.
  __device__ __forceinline__ FarNumbers find(float given) const {
    const HeadTerms terms = HeadTerms::of(p_, a_.score, s_.index, head_);
    const bool packed_q = p_.cu_seqlens_q != nullptr, packed_k = p_.cu_seqlens_k != nullptr;
    const Columns query(strided_rows(p_.q, packed_q, s_.index, s_.first_q, head_)[row_], p_);
    const StridedRows keys = strided_rows(p_.k, packed_k, s_.index, s_.first_k,
                                          head_ / (int32_t(p_.heads) / int32_t(p_.heads_k)));
    float max = a_.score.floor, sum = 0;
    for (int32_t key = mask_.kv_begin(row_); key < mask_.kv_end(row_); ++key) {
      const float x = score(query * Columns(keys[key], p_), terms, key);
      if (x > max) {
        sum *= weight(max, x);
        max = x;
      }
      sum += weight(x, max);
    }
    if (sum == 0) return {0, infinity(), -infinity()};  // without keys
    const float largest = logit(a_.score, max);
    const float sink = p_.sinks ? (p_.sinks[head_] - largest) * kLog2e : -infinity();
    // Beyond some 2^100 the keys are nothing beside the sink.
    const float lse = sink > 100 ? sink : ptx::lg2(sum + ptx::ex2(sink));
    // Nor are they beside other keys, which a larger log-sum-exp, merged from several calls, has in
    // it.
    const bool merged = largest + lse * kLn2 < given - fabsf(given) * 0x1p-12f;
    return {max, merged ? infinity() : lse, sink - lse};
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

  __device__ __forceinline__ float weight(float score, float beside) const {
    return ptx::ex2((score - beside) * a_.score.exponent);
  }

  // As a tile has it, but for the order of a sum.
  __device__ __forceinline__ float score(float product, const HeadTerms& terms, int32_t key) const {
    float x[1][1][4] = {{{product, 0, 0, 0}}};
    cap_scores<true>(x, a_.score);
    add_terms<true>(x, p_, a_.score, terms, row_, key, mask_);
    return x[0][0][0];
  }

  const BackwardArguments& a_;
  const AttentionParams& p_;
  const Sequence& s_;
  const int32_t head_;
  const int32_t row_;
  const IntervalMask<int32_t> mask_;
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
  float dsink = 0;
  for (int32_t r = warp; r < kRowTile; r += kBackwardWarps) {
    const int32_t row = block.row_begin + r;
    float reference = 0;
    const float lse = row < rows ? statistics_of(p, p.lse, s, head)[row] : 0.0f;
    if (is_far(lse)) {
      const FarNumbers found = FarRow<T>(a, s, head, row).find(lse);
      reference = found.reference;
      if (lane == 0) {
        a.rows[first + r].lse = found.lse;
        dsink -= ptx::ex2(found.sink) * a.rows[first + r].delta;
      }
    }
    if (lane == 0) a.references[first + r] = reference;
  }
  if (!a.dsinks_parts) return;
  dsink = block_sum(dsink);
  if (threadIdx.x == 0) a.dsinks_parts[first / kRowTile] += dsink;
}

}  // namespace anyflash::sm80
