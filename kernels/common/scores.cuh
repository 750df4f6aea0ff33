// What happens to a warp's scores between the two products: softcap, ALiBi, mask, dropout. Scores
// are an Accumulator of mma_tile.cuh.
#pragma once

#include "kernels/common/online_softmax.cuh"
#include "kernels/masks.h"
#include "kernels/philox.h"

namespace anyflash {

// The features that cost registers, each including the ones before. A kernel is compiled for each.
enum class Extras : int32_t { none, score_mod, dropout };

// Numbers of a call that the host prepares once.
struct ScoreArguments {
  float scale;    // of the raw products, in score_mod
  float softcap;  // 0: none
  float inverse_softcap;
  float logit;          // of the softmax's scores: 1, with Extras::none softmax_scale
  float exponent;       // log2(e) times that
  int32_t window_left;  // negative: unbounded
  int32_t window_right;
  bool alibi_by_key;           // the mask is purely causal: slope * key, else - slope * distance
  uint32_t dropout_threshold;  // of Dropout; 0: keeps all
  float keep_scale;            // 1 / (1 - dropout_p)
};

// Keys that a query row sees.
struct KeyInterval {
  int32_t begin;
  int32_t end;
};

// scores[m][n][i] belongs to key first_key + 8 n + i % 2 and row 2 m + i / 2 of the thread;
// first_key counts the thread's own column in.
template <int32_t kMTiles, int32_t kNTiles>
__device__ __forceinline__ void hide_keys(float (&scores)[kMTiles][kNTiles][4], int32_t first_key,
                                          const KeyInterval (&visible)[2 * kMTiles]) {
#pragma unroll
  for (int32_t m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int32_t h = 0; h < 2; ++h) {
      const KeyInterval& keys = visible[2 * m + h];
#pragma unroll
      for (int32_t n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int32_t i = 0; i < 2; ++i) {
          const int32_t key = first_key + 8 * n + i;
          if (key < keys.begin || key >= keys.end) scores[m][n][2 * h + i] = -infinity();
        }
      }
    }
  }
}

// What ALiBi needs of a query row.
struct AlibiRow {
  float slope;
  int32_t diagonal;  // the key that stands where the row stands
};

template <int32_t kMTiles, int32_t kNTiles>
__device__ __forceinline__ void modify_scores(float (&scores)[kMTiles][kNTiles][4],
                                              int32_t first_key,
                                              const AlibiRow (&alibi)[2 * kMTiles],
                                              const ScoreArguments& a) {
#pragma unroll
  for (int32_t m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int32_t n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        const AlibiRow& row = alibi[2 * m + i / 2];
        const int32_t key = first_key + 8 * n + i % 2;
        float x = scores[m][n][i] * a.scale;
        if (a.softcap > 0) x = a.softcap * tanhf(x * a.inverse_softcap);
        const int32_t position = a.alibi_by_key ? key : -abs(row.diagonal - key);
        scores[m][n][i] = x + row.slope * float(position);
      }
    }
  }
}

// Clears what dropout takes from probabilities whose first row (of the thread) is `row`, in 16-row
// tiles from there on. One draw of Philox is what the thread holds of a 16 x 16 tile.
template <int32_t kMTiles, int32_t kNTiles>
__device__ __forceinline__ void drop(float (&probabilities)[kMTiles][kNTiles][4],
                                     const Dropout& dropout, uint32_t bh, int32_t row,
                                     int32_t first_key) {
#pragma unroll
  for (int32_t m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int32_t n = 0; n < kNTiles; n += 2) {
      const PhiloxWords words =
          dropout.words(bh, uint32_t(row + 16 * m), uint32_t(first_key + 8 * n));
#pragma unroll
      for (int32_t i = 0; i < 8; ++i) {
        float& x = probabilities[m][n + i / 4][i % 4];
        const uint32_t bits = Dropout::bits16(words, i % 4 / 2 * 8, i / 4 * 8 + i % 2);
        if (bits < dropout.threshold) x = 0;
      }
    }
  }
}

}  // namespace anyflash
