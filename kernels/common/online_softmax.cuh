// Softmax over keys that arrive tile by tile, in powers of two: with x the scores so far and
// c = `scale` (log2(e), times softmax_scale where the scores are raw products),
//
//   max = max x,   sum = sum 2^(c x - c max),   out = sum 2^(c x - c max) value
//
// A warp's scores are an Accumulator; a row's numbers are spread over the four lanes of a quad. All
// four know the row's maximum, each keeps the sum of its own columns until finish().
#pragma once

#include "kernels/common/ptx.cuh"

namespace anyflash {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7F800000); }

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, ptx::shuffle_xor(x, 1));
  return fmaxf(x, ptx::shuffle_xor(x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += ptx::shuffle_xor(x, 1);
  return x + ptx::shuffle_xor(x, 2);
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int32_t lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, ptx::shuffle_xor(x, lanes));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int32_t lanes = 16; lanes > 0; lanes /= 2) x += ptx::shuffle_xor(x, lanes);
  return x;
}

// A row that has seen no key has the maximum -inf; 0 in its place keeps 2^(-inf - 0) at 0.
__device__ __forceinline__ float finite_max(float max) { return max == -infinity() ? 0.0f : max; }

template <int32_t kMTiles>
struct OnlineSoftmax {
  // Of row 8 h + lane / 4 of 16-row tile m.
  float max[kMTiles][2];
  float sum[kMTiles][2];

  // `floor`: a finite number below every score of a visible key, so that 2^(hidden - max) is 0 in a
  // row that has seen no key, without a test.
  __device__ __forceinline__ explicit OnlineSoftmax(float floor) {
#pragma unroll
    for (int32_t m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int32_t h = 0; h < 2; ++h) {
        max[m][h] = floor;
        sum[m][h] = 0;
      }
    }
  }

  // Scores become their probabilities' numerators; sums and out shrink to the new maximum. kFar: of
  // any size. Else c x is not rounded where c max is, which from some 2^27 on makes a difference.
  template <bool kFar, int32_t kNTiles, int32_t kOutTiles>
  __device__ __forceinline__ void update(float (&scores)[kMTiles][kNTiles][4],
                                         float (&out)[kMTiles][kOutTiles][4], float scale) {
#pragma unroll
    for (int32_t m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int32_t h = 0; h < 2; ++h) {
        float row_max = max[m][h];
#pragma unroll
        for (int32_t n = 0; n < kNTiles; ++n) {
          row_max = fmaxf(row_max, fmaxf(scores[m][n][2 * h], scores[m][n][2 * h + 1]));
        }
        row_max = quad_max(row_max);
        const float subtrahend = row_max * scale;
        const auto weight = [&](float x) {
          return ptx::ex2(kFar ? (x - row_max) * scale : x * scale - subtrahend);
        };
        const float shrink = weight(max[m][h]);
        max[m][h] = row_max;

        float row_sum = sum[m][h] * shrink;
#pragma unroll
        for (int32_t n = 0; n < kNTiles; ++n) {
#pragma unroll
          for (int32_t i = 2 * h; i < 2 * h + 2; ++i) {
            scores[m][n][i] = weight(scores[m][n][i]);
            row_sum += scores[m][n][i];
          }
        }
        sum[m][h] = row_sum;
#pragma unroll
        for (int32_t n = 0; n < kOutTiles; ++n) {
          out[m][n][2 * h] *= shrink;
          out[m][n][2 * h + 1] *= shrink;
        }
      }
    }
  }
};

// What a row comes to: out = numerator * inverse_sum. `max` is its largest logit, `sum` the whole
// row's, `sink` one more logit without a value (-inf: none). A row without keys has out 0 and lse
// +inf whatever the sink.
struct RowResult {
  float inverse_sum;
  float lse;
};

__device__ __forceinline__ RowResult finish_row(float max, float sum, float sink) {
  const bool empty = max == -infinity();
  const float largest = fmaxf(finite_max(max), sink);  // a sink may be far above
  const float weight = ptx::ex2((max - largest) * kLog2e);
  const float whole = sum * weight + ptx::ex2((sink - largest) * kLog2e);
  return {empty ? 0.0f : weight * ptx::rcp(whole),
          empty ? infinity() : largest + ptx::lg2(whole) * kLn2};
}

}  // namespace anyflash
