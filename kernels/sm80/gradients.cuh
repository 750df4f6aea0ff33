// Probabilities made again from scores and log-sum-exps, and their gradients: what the backward
// does between its products. Scores are an Accumulator of mma_tile.cuh, rows of queries by columns
// of keys.
//
//   P = exp(logit - lse),   d logit = P (dP - delta),   delta = sum dO O - dlse
//   dbias = d logit,   dS = d logit times the slope of a softcap
//
// dS is without softmax_scale, which dq and dk get at their ends.
#pragma once

#include "kernels/common/mma_tile.cuh"
#include "kernels/common/scores.cuh"
#include "kernels/common/sequence.cuh"
#include "kernels/sm80/backward_arguments.h"

namespace anyflash::sm80 {

// What belongs to one query head.
struct HeadNumbers {
  HeadTerms terms;
  Dropout dropout;
  uint32_t bh;   // sequence * heads + head
  float* dbias;  // of query 0 and key 0

  __device__ __forceinline__ static HeadNumbers of(const AttentionParams& p,
                                                   const ScoreArguments& score, int32_t sequence,
                                                   int32_t head) {
    HeadNumbers x{HeadTerms::of(p, score, sequence, head),
                  {0, 0, score.dropout_threshold},
                  uint32_t(sequence * int32_t(p.heads) + head),
                  p.dbias + sequence * p.dbias_stride[0] + head * p.dbias_stride[1]};
    if (p.rng_state)
      x.dropout = {uint64_t(p.rng_state[0]), uint32_t(p.rng_state[1]), score.dropout_threshold};
    return x;
  }
};

// d capped / d raw of a softcap, from the capped score.
__device__ __forceinline__ float cap_slope(Softcap softcap, float x) {
  if (softcap == Softcap::tanh) return 1.0f - x * x;
  const float visible = fmaxf(x, 0.0f);  // hidden: -inf
  return 4.0f * (visible - visible * visible);
}

// The first row and key of a thread.
struct Corner {
  int32_t row;
  int32_t key;
};

// Adds gradients of logits to those of a head's bias, of rows at.row, at.row + 8, ... and the
// thread's keys. What a bias has once for many rows or keys, a warp adds up first.
template <int32_t kMTiles, int32_t kNTiles>
__device__ __forceinline__ void add_to_bias(const float (&x)[kMTiles][kNTiles][4],
                                            const AttentionParams& p, const Sequence& s,
                                            float* dbias, const Corner& at) {
  const int32_t lane = int32_t(threadIdx.x) % kWarpThreads;
  const auto row = [&](int32_t r) { return at.row + 8 * r; };
  const auto key = [&](int32_t c) { return at.key + c / 2 * 8 + c % 2; };
  const int32_t end_row = smaller(s.seqlen_q, int32_t(p.seqlen_q));
  const int32_t end_key = smaller(s.seqlen_k, int32_t(p.seqlen_k));
  // Zero where there is no row or key: there are no probabilities.
  const auto value = [&](int32_t r, int32_t c) { return x[r / 2][c / 2][r % 2 * 2 + c % 2]; };
  const int64_t row_stride = p.dbias_stride[2], key_stride = p.dbias_stride[3];
  if (key_stride == 0) {
    float of_rows = 0;
#pragma unroll
    for (int32_t r = 0; r < 2 * kMTiles; ++r) {
      float sum = 0;
#pragma unroll
      for (int32_t c = 0; c < 2 * kNTiles; ++c) sum += value(r, c);
      if (row_stride == 0) {
        of_rows += sum;
        continue;
      }
      sum = quad_sum(sum);
      if (lane % 4 == 0 && row(r) < end_row) ptx::add(dbias + row(r) * row_stride, sum);
    }
    if (row_stride != 0) return;
    of_rows = warp_sum(of_rows);
    if (lane == 0) ptx::add(dbias, of_rows);
    return;
  }
#pragma unroll
  for (int32_t c = 0; c < 2 * kNTiles; ++c) {
    float sum = 0;
#pragma unroll
    for (int32_t r = 0; r < 2 * kMTiles; ++r) {
      if (row_stride == 0) {
        sum += value(r, c);
      } else if (row(r) < end_row && key(c) < end_key) {
        ptx::add(dbias + row(r) * row_stride + key(c) * key_stride, value(r, c));
      }
    }
    if (row_stride != 0) continue;
#pragma unroll
    for (int32_t lanes = 4; lanes < kWarpThreads; lanes *= 2) sum += ptx::shuffle_xor(sum, lanes);
    if (lane < 4 && key(c) < end_key) ptx::add(dbias + key(c) * key_stride, sum);
  }
}

// A warp's part of one tile.
template <Extras kExtras, int32_t kMTiles, int32_t kNTiles>
class Gradients {
  using Tile = float[kMTiles][kNTiles][4];

  static constexpr bool kAll = kExtras == Extras::all;
  static constexpr int32_t kM = kAll ? kMTiles : 1, kN = kAll ? kNTiles : 1;

  const ScoreArguments& a_;
  const AttentionParams& p_;
  float lse_[kMTiles][2];
  float delta_[kMTiles][2];
  [[maybe_unused]] float reference_[kM][2];
  // Of a softcap; with ALiBi or a bias the scores do not tell them any more.
  [[maybe_unused]] float slopes_[kM][kN][4];

 public:
  // `rows`: of the sequence and head, from the thread's first row on.
  __device__ __forceinline__ Gradients(const BackwardArguments& a, const RowNumbers* rows)
      : a_(a.score), p_(a.attention) {
#pragma unroll
    for (int32_t m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int32_t h = 0; h < 2; ++h) {
        const RowNumbers numbers = rows[16 * m + 8 * h];
        lse_[m][h] = numbers.lse;
        delta_[m][h] = numbers.delta;
        if constexpr (kAll) {
          reference_[m][h] = a.references ? a.references[rows - a.rows + 16 * m + 8 * h] : 0;
        }
      }
    }
  }

  // Raw products become probabilities, which `take(m, n, h, x, y)` gets two at a time, of keys that
  // follow each other. What dropout takes is negative, and Extras::score_mod has the slopes of its
  // softcap in them from then on. `corner()` and `mask()` tell what most tiles need not know.
  template <typename CornerOf, typename MaskOf, typename Take>
  __device__ __forceinline__ void probabilities(Tile& x, const HeadNumbers& head,
                                                const CornerOf& corner, const MaskOf& mask,
                                                bool masked, const Take& take) {
    if constexpr (modifies_scores(kExtras)) {
      cap_scores<kAll>(x, a_);
      if constexpr (kAll) {
        for_each(x, [&](int32_t m, int32_t n, int32_t i) {
          slopes_[m][n][i] = a_.softcap == Softcap::none ? 1.0f : cap_slope(a_.softcap, x[m][n][i]);
        });
      }
      if (p_.alibi_slopes || (kAll && p_.bias)) {
        const Corner at = corner();
        add_terms<kAll>(x, p_, a_, head.terms, at.row, at.key, mask());
      }
    }
    if (masked) hide(x, corner(), mask());
    if (kExtras == Extras::score_mod && a_.softcap != Softcap::none) {
      exponentiate(x, take, [&](float score) { return cap_slope(Softcap::sigmoid, score); });
      return;
    }
    if constexpr (!drops(kExtras)) {
      exponentiate(x, take, [](float) { return 1.0f; });
      return;
    }
    exponentiate(x, [](int32_t, int32_t, int32_t, float, float) {}, [](float) { return 1.0f; });
    if (a_.dropout_threshold > 0) {
      const Corner at = corner();
      drop(x, head.dropout, head.bh, at.row, at.key, [](float dropped) { return -dropped; });
    }
    for_pairs(x, [&](int32_t m, int32_t n, int32_t h) {
      take(m, n, h, ptx::relu(x[m][n][2 * h]), ptx::relu(x[m][n][2 * h + 1]));
    });
  }

  // dP becomes dS. `take_logits(dp)` sees the gradients of the logits, with Extras::all.
  template <typename Take>
  __device__ __forceinline__ void scores(Tile& dp, const Tile& probabilities,
                                         const Take& take_logits) const {
    for_each(dp, [&](int32_t m, int32_t n, int32_t i) {
      float& x = dp[m][n][i];
      const float p = probabilities[m][n][i], delta = delta_[m][i / 2];
      if constexpr (drops(kExtras)) {
        const bool kept = __float_as_int(p) >= 0;
        x = fabsf(p) * ((kept ? x * a_.keep_scale : 0.0f) - delta);
      } else {
        x = p * (x - delta);
      }
    });
    if constexpr (kAll) {
      take_logits(dp);
      for_each(dp, [&](int32_t m, int32_t n, int32_t i) { dp[m][n][i] *= slopes_[m][n][i]; });
    }
  }

 private:
  template <typename Take, typename Slope>
  __device__ __forceinline__ void exponentiate(Tile& x, const Take& take, const Slope& slope) {
    for_pairs(x, [&](int32_t m, int32_t n, int32_t h) {
      float& left = x[m][n][2 * h];
      float& right = x[m][n][2 * h + 1];
      if constexpr (kAll) {
        left -= reference_[m][h];
        right -= reference_[m][h];
      }
      const float left_p = ptx::ex2(left * a_.exponent - lse_[m][h]);
      const float right_p = ptx::ex2(right * a_.exponent - lse_[m][h]);
      take(m, n, h, left_p, right_p);
      left = left_p * slope(left);
      right = right_p * slope(right);
    });
  }

  __device__ __forceinline__ void hide(Tile& x, const Corner& at,
                                       const IntervalMask<int32_t>& mask) {
    int32_t limit[2 * kMTiles];
#pragma unroll
    for (int32_t r = 0; r < 2 * kMTiles; ++r) limit[r] = mask.kv_end(at.row + 8 * r);
    hide_keys(x, at.key, [&](int32_t r, int32_t key) { return key < limit[r]; });
    if (mask.window_left < 0) return;
#pragma unroll
    for (int32_t r = 0; r < 2 * kMTiles; ++r) limit[r] = mask.kv_begin(at.row + 8 * r);
    hide_keys(x, at.key, [&](int32_t r, int32_t key) { return key >= limit[r]; });
  }
};

}  // namespace anyflash::sm80
