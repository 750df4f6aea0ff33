// What happens to a warp's scores between the two products: softcap, ALiBi, bias, mask, dropout.
// Scores are an Accumulator of mma_tile.cuh.
#pragma once

#include "kernels/common/mma_tile.cuh"
#include "kernels/common/online_softmax.cuh"
#include "kernels/masks.h"
#include "kernels/params.h"
#include "kernels/philox.h"

namespace anyflash {

// What a kernel does to scores, each compiled for itself: nothing; softcap and ALiBi; dropout; all
// of it and a bias, for what the others leave out.
enum class Extras : int32_t { none, score_mod, dropout, all };

ANYFLASH_HOST_DEVICE constexpr bool modifies_scores(Extras extras) {
  return extras == Extras::score_mod || extras == Extras::all;
}
ANYFLASH_HOST_DEVICE constexpr bool drops(Extras extras) {
  return extras == Extras::dropout || extras == Extras::all;
}

// cap * tanh(x / cap), up to a constant that the softmax does not see:
//   sigmoid   2 cap / (1 + 2^(-2 log2(e) x / cap)): two instructions of the special unit. Its error
//             is 2^-22 cap, so the cap must not be large
//   tanh      as precise as x for any cap
enum class Softcap : int32_t { none, sigmoid, tanh };

// Numbers of a call that the host prepares once. A kernel's scores are logits in a unit of its own:
// logit = score * unit + origin.
struct ScoreArguments {
  float factor;  // of the raw products
  Softcap softcap;
  float capped;  // of a product under a softcap: its exponent, or its part of the cap
  float unit;    // positive
  float origin;
  float inverse_unit;
  float exponent;  // unit * log2(e)
  float floor;     // below every score whose logit is finite; the maximum of a row without keys
  int32_t window_left;  // negative: unbounded
  int32_t window_right;
  bool alibi_by_key;           // the mask is purely causal: slope * key, else - slope * distance
  uint32_t dropout_threshold;  // of Dropout
  float keep_scale;            // 1 / (1 - dropout_p)
};

// The logit of a row's maximum; -inf for a row without keys.
__device__ __forceinline__ float logit(const ScoreArguments& a, float max) {
  return max == a.floor ? -infinity() : max * a.unit + a.origin;
}

// scores[m][n][i] belongs to key first_key + 8 n + i % 2 and row 2 m + i / 2 of the thread;
// first_key counts the thread's own column in. `keep(row, key)` says what is visible.
template <int32_t kMTiles, int32_t kNTiles, typename Keep>
__device__ __forceinline__ void hide_keys(float (&scores)[kMTiles][kNTiles][4], int32_t first_key,
                                          const Keep& keep) {
  for_each(scores, [&](int32_t m, int32_t n, int32_t i) {
    if (!keep(2 * m + i / 2, first_key + 8 * n + i % 2)) scores[m][n][i] = -infinity();
  });
}

template <int32_t kMTiles, int32_t kNTiles, typename Function>
__device__ __forceinline__ void map_scores(float (&scores)[kMTiles][kNTiles][4],
                                           const Function& function) {
  for_each(scores,
           [&](int32_t m, int32_t n, int32_t i) { scores[m][n][i] = function(scores[m][n][i]); });
}

// tanh(x) with a relative error of some 2^-21: below 1/4 its series, above by way of 2^x.
__device__ __forceinline__ float tanh(float x) {
  const float square = x * x;
  float series = -17.0f / 315.0f + square * (62.0f / 2835.0f);
  series = 2.0f / 15.0f + square * series;
  series = -1.0f / 3.0f + square * series;
  series = x + x * square * series;
  const float far = 1.0f - 2.0f * ptx::rcp(1.0f + ptx::ex2(2.0f * kLog2e * x));
  return fabsf(x) < 0.25f ? series : far;
}

// Branches are the same for all threads, so that a call pays for what it has.
template <bool kAnyCap, int32_t kMTiles, int32_t kNTiles>
__device__ __forceinline__ void modify_scores(float (&scores)[kMTiles][kNTiles][4],
                                              const ScoreArguments& a) {
  if (a.factor != 1) map_scores(scores, [&](float x) { return x * a.factor; });
  if (a.softcap == Softcap::sigmoid) {
    map_scores(scores, [&](float x) { return ptx::rcp(1.0f + ptx::ex2(x * a.capped)); });
  }
  if (kAnyCap && a.softcap == Softcap::tanh) {
    map_scores(scores, [&](float x) { return tanh(x * a.capped); });
  }
}

// ALiBi (Press et al., arXiv:2108.12409), slopes in units of the scores, the same for all rows or
// not: slope * key, or - slope * the distance from the row's diagonal, the key that stands where
// the row stands.
template <bool kByKey, int32_t kMTiles, int32_t kNTiles>
__device__ __forceinline__ void add_alibi_by(float (&scores)[kMTiles][kNTiles][4],
                                             int32_t first_key, const float (&slope)[2 * kMTiles],
                                             const int32_t (&diagonal)[2 * kMTiles]) {
#pragma unroll
  for (int32_t r = 0; r < 2 * kMTiles; ++r) {
    const float first = float(kByKey ? first_key : first_key - diagonal[r]);
#pragma unroll
    for (int32_t n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int32_t i = 0; i < 2; ++i) {
        float& x = scores[r / 2][n][r % 2 * 2 + i];
        x = slope[r] * (kByKey ? first + float(8 * n + i) : -fabsf(first + float(8 * n + i))) + x;
      }
    }
  }
}

template <int32_t kMTiles, int32_t kNTiles>
__device__ __forceinline__ void add_alibi(float (&scores)[kMTiles][kNTiles][4], int32_t first_key,
                                          const float (&slope)[2 * kMTiles],
                                          const int32_t (&diagonal)[2 * kMTiles], bool by_key) {
  if (by_key) {
    add_alibi_by<true>(scores, first_key, slope, diagonal);
  } else {
    add_alibi_by<false>(scores, first_key, slope, diagonal);
  }
}

// Query 0 and key 0 of a head's bias.
__device__ __forceinline__ const char* bias_of(const AttentionParams& p, int32_t sequence,
                                               int32_t head) {
  const int64_t elements = sequence * p.bias_stride[0] + head * p.bias_stride[1];
  return static_cast<const char*>(p.bias) + elements * bytes_of(p.bias_type);
}

__device__ __forceinline__ float bias_value(fp16 x) { return to_fp32(x); }
__device__ __forceinline__ float bias_value(bf16 x) { return to_fp32(x); }
__device__ __forceinline__ float bias_value(fp32 x) { return x; }
__device__ __forceinline__ float bias_value(unsigned char x) { return x ? 0.0f : -infinity(); }

template <typename Bias, int32_t kMTiles, int32_t kNTiles>
__device__ __forceinline__ void add_bias_of(float (&scores)[kMTiles][kNTiles][4],
                                            const AttentionParams& p, const ScoreArguments& a,
                                            const char* bias, int32_t row, int32_t first_key,
                                            int32_t seqlen_q, int32_t seqlen_k) {
  const float lowest = a.floor * (1 - 0x1p-22f);
#pragma unroll
  for (int32_t r = 0; r < 2 * kMTiles; ++r) {
    if (row + 8 * r >= seqlen_q) continue;
    const auto* of_row = reinterpret_cast<const Bias*>(bias) + (row + 8 * r) * p.bias_stride[2];
#pragma unroll
    for (int32_t n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int32_t i = 0; i < 2; ++i) {
        const int32_t key = first_key + 8 * n + i;
        if (key >= seqlen_k) continue;
        const float value = bias_value(of_row[key * p.bias_stride[3]]);
        float& x = scores[r / 2][n][r % 2 * 2 + i];
        x += value * a.inverse_unit;
        if (x < lowest && value > -infinity()) x = lowest;
      }
    }
  }
}

// The bias of a head (bias_of) for rows row, row + 8, ... of the queries and the thread's keys, as
// far as they exist. Sums of finite numbers stay finite: a row of nothing but the least float, as
// many write masks, has keys.
template <int32_t kMTiles, int32_t kNTiles>
__device__ __forceinline__ void add_bias(float (&scores)[kMTiles][kNTiles][4],
                                         const AttentionParams& p, const ScoreArguments& a,
                                         const char* bias, int32_t row, int32_t first_key,
                                         int32_t seqlen_q, int32_t seqlen_k) {
  const auto add = [&](auto element) {
    add_bias_of<decltype(element)>(scores, p, a, bias, row, first_key, seqlen_q, seqlen_k);
  };
  if (p.bias_type == BiasType::fp16) add(fp16{});
  if (p.bias_type == BiasType::bf16) add(bf16{});
  if (p.bias_type == BiasType::fp32) add(fp32{});
  if (p.bias_type == BiasType::boolean) add(static_cast<unsigned char>(0));
}

// What dropout takes of probabilities whose first row (of the thread) is `row`, in 16-row tiles
// from there on, becomes function(x). One draw of Philox is what the thread holds of a 16 x 16
// tile.
template <int32_t kMTiles, int32_t kNTiles, typename Function>
__device__ __forceinline__ void drop(float (&probabilities)[kMTiles][kNTiles][4],
                                     const Dropout& dropout, uint32_t bh, int32_t row,
                                     int32_t first_key, const Function& function) {
  const uint32_t row_word = Dropout::row_word(uint32_t(row));
  const uint32_t col_word = Dropout::col_word(uint32_t(first_key));
#pragma unroll
  for (int32_t m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int32_t n = 0; n < kNTiles; n += 2) {
      const PhiloxWords words = dropout.draw(bh, row_word + 8 * m, col_word + 2 * n);
#pragma unroll
      for (int32_t i = 0; i < 8; ++i) {
        float& x = probabilities[m][n + i / 4][i % 4];
        if (!dropout.keeps(words, i % 4 / 2 * 8, i / 4 * 8 + i % 2)) x = function(x);
      }
    }
  }
}

}  // namespace anyflash
