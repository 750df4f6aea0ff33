// From dot products to logits: scale, softcap, ALiBi, bias, masks and dropout bits, on tiles
// tile[key][lane] whose lanes are rows. Logits are what the caller means by them, floats up to the
// end of their range; the softmax multiplies with log2(e) what is left of them beside the largest.
#pragma once

#include "kernels/cpu/rows.h"
#include "kernels/philox.h"

namespace anyflash::cpu::ANYFLASH_ISA {

constexpr int kPanel = kMaxVectors * kLanes;  // rows side by side: a panel
// Keys of a tile of scores at most. Where products go through AMX's tiles, what is done once per
// block takes as long as they do.
#if defined(ANYFLASH_TILES)
constexpr int kBlock = 192;
#else
constexpr int kBlock = 96;
#endif

// Keys per block, so that `keys` are cut into blocks of about the same size: a small rest would
// cost as much beside its products as a full block. A multiple of 12, or 32 where there are tiles:
// whole tiles, whole pairs.
template <class Product>
ANYFLASH_INLINE int balanced_block(int64_t keys) {
  constexpr int kWhole = Product::kTiles ? 32 : 12;
  const int64_t blocks = larger<int64_t>(1, (keys + kBlock - 1) / kBlock);
  return static_cast<int>(smaller<int64_t>(kBlock, round_up((keys + blocks - 1) / blocks, kWhole)));
}

constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kLeastNormal = 0x1p-126f;

// The rows of a panel, one per lane. Lanes behind the last row repeat it, so that they never ask
// for a mask of their own.
struct Lanes {
  int rows;
  int vectors;              // of lanes that hold rows
  TileRange<int64_t> some;  // keys that some row sees
  TileRange<int64_t> all;   // keys that every row sees
  int32_t key_begin[kPanel];
  int32_t key_end[kPanel];
  int32_t diagonal[kPanel];  // the key that a row stands beside: query + shift
  float slope[kPanel];       // ALiBi's
  const char* bias[kPanel];  // first key's
  int64_t query;             // of lane 0
  int64_t head;              // of lane 0
};

// What one lane knows of its row.
ANYFLASH_INLINE void describe_lane(const AttentionParams& p, const Sequence& sequence,
                                   int64_t query, int64_t head, int lane, Lanes& lanes) {
  const IntervalMask<int64_t>& mask = sequence.mask;
  lanes.key_begin[lane] = static_cast<int32_t>(mask.kv_begin(query));
  lanes.key_end[lane] = static_cast<int32_t>(larger<int64_t>(0, mask.kv_end(query)));
  lanes.diagonal[lane] = static_cast<int32_t>(query + mask.shift());
  if (p.alibi_slopes) {
    lanes.slope[lane] = p.alibi_slopes[sequence.index * p.alibi_batch_stride + head];
  }
  if (p.bias) {
    lanes.bias[lane] = static_cast<const char*>(p.bias) +
                       bytes_of(p.bias_type) * (sequence.index * p.bias_stride[0] +
                                                head * p.bias_stride[1] + query * p.bias_stride[2]);
  }
}

// Keys that some and that every row of [row_begin, row_end) sees.
ANYFLASH_INLINE void describe_keys(const RowSpace& rows, const IntervalMask<int64_t>& mask,
                                   int64_t row_begin, int64_t row_end, Lanes& lanes) {
  lanes.some = rows.keys(mask, row_begin, row_end);
  lanes.all = {mask.kv_begin(rows.query(row_end - 1)),
               larger<int64_t>(0, mask.kv_end(rows.query(row_begin)))};
}

ANYFLASH_INLINE void describe_lanes(const AttentionParams& p, const RowSpace& space_of_rows,
                                    const Sequence& sequence, int64_t space, int64_t row_begin,
                                    int64_t row_end, Lanes& lanes) {
  lanes.rows = static_cast<int>(smaller<int64_t>(kPanel, row_end - row_begin));
  lanes.vectors = (lanes.rows + kLanes - 1) / kLanes;
  describe_keys(space_of_rows, sequence.mask, row_begin, row_begin + lanes.rows, lanes);
  lanes.query = space_of_rows.query(row_begin);
  lanes.head = space_of_rows.head(space, row_begin);
  int64_t query = lanes.query, head = row_begin % space_of_rows.heads;
  for (int r = 0; r < lanes.vectors * kLanes; ++r) {
    describe_lane(p, sequence, query, space * space_of_rows.heads + head, r, lanes);
    if (r + 1 < lanes.rows && ++head == space_of_rows.heads) {
      head = 0;
      ++query;
    }
  }
}

// What scores are multiplied with: rounded once, since the error grows with the score.
struct Scales {
  float logit;     // dot product to logit
  float argument;  // dot product to the argument of the softcap's tanh
  float cap;

  ANYFLASH_INLINE Scales of(const AttentionParams& p) {
    return {static_cast<float>(p.softmax_scale),
            p.softcap > 0 ? static_cast<float>(p.softmax_scale / p.softcap) : 0.0f,
            static_cast<float>(p.softcap)};
  }
};

// Logits that are a positive multiple of the dot product: the softmax scales them itself.
ANYFLASH_INLINE bool only_scaled(const AttentionParams& p) {
  return p.softmax_scale >= kLeastNormal && p.softcap == 0 && !p.alibi_slopes && !p.bias;
}

// What the tiles hold is a multiple of the logits: the one is this times the other,
ANYFLASH_INLINE float logit_scale(const AttentionParams& p) {
  return only_scaled(p) ? Scales::of(p).logit : 1.0f;
}

// and the exponent of 2 is this times what the tiles hold.
ANYFLASH_INLINE float exponent_scale(const AttentionParams& p) {
  constexpr double kLog2eExactly = 1.4426950408889634;
  return only_scaled(p) ? static_cast<float>(p.softmax_scale * kLog2eExactly) : kLog2e;
}

// Scores x of a row to exponents x * factor - reference: 0 for the largest, apart from the rounding
// of the reference. Far from 0 that is an exponent of its own, which sums of weights that were
// formed beside different references may not ignore.
struct Exponents {
  Float factor;
  Float reference;

  // Of lanes whose largest score is `max`, -inf where none is seen yet. `scale`: exponent_scale.
  ANYFLASH_INLINE Exponents of(Float max, float scale) {
    const Float product = max * scale;
    // From 2^30 on the rounding of the product alone could be an exponent. Two scores that differ
    // are then at least 2^6 apart, so that the smaller weighs nothing: so it does by a factor that
    // is a power of two and takes the largest score to 2^29 exactly.
    const Int far = maximum(product, -product) >= broadcast(0x1p30f);
    const Words power = ((127u + 29u + 127u) << 23) - ((Words)max & 0x7F800000u);
    const Float factor = select(far, (Float)power, broadcast(scale));
    return {factor, select(max == broadcast(-kInfinity), Float{}, max * factor)};
  }

  __attribute__((always_inline)) Float at(Float x) const {
    return multiply_add(x, factor, -reference);
  }

  // What the reference of a finite largest score x is less than its exponent.
  __attribute__((always_inline)) Float rounding(Float x) const {
    return multiply_add(x, factor, -(x * factor));
  }
};

// kLanes keys of one row's bias; -inf where a boolean mask hides. Missing keys are 0.
ANYFLASH_INLINE Float load_bias(const AttentionParams& p, const char* row, int64_t key, int count) {
  const int64_t stride = p.bias_stride[3];
  const char* first = row + key * stride * bytes_of(p.bias_type);
  if (stride == 1 && p.bias_type == BiasType::fp32) {
    return load_some(reinterpret_cast<const float*>(first), count);
  }
  if (stride == 1 && p.bias_type == BiasType::bf16) {
    return load_some(reinterpret_cast<const Bf16*>(first), count);
  }
  if (stride == 1 && p.bias_type == BiasType::fp16) {
    return load_some(reinterpret_cast<const Fp16*>(first), count);
  }
  Float x{};
  for (int i = 0; i < count; ++i, first += stride * bytes_of(p.bias_type)) {
    switch (p.bias_type) {
      case BiasType::boolean:
        x[i] = *first ? 0.0f : -kInfinity;
        break;
      case BiasType::fp32:
        x[i] = load_some(reinterpret_cast<const float*>(first), 1)[0];
        break;
      case BiasType::bf16:
        x[i] = load_some(reinterpret_cast<const Bf16*>(first), 1)[0];
        break;
      default:
        x[i] = load_some(reinterpret_cast<const Fp16*>(first), 1)[0];
    }
  }
  return x;
}

ANYFLASH_INLINE void add_bias(const AttentionParams& p, const Lanes& lanes, int64_t first_key,
                              int keys, float* tile) {
  for (int row = 0; row < lanes.vectors * kLanes; row += kLanes) {
    for (int key = 0; key < keys; key += kLanes) {
      const int count = keys - key < kLanes ? keys - key : kLanes;
      Words block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = (Words)load_bias(p, lanes.bias[row + i], first_key + key, count);
      }
      transpose_in_registers(block);
      for (int i = 0; i < count; ++i) {
        float* at = tile + (key + i) * kPanel + row;
        store(at, load(at) + (Float)block[i]);
      }
    }
  }
}

// Scale, softcap, ALiBi and bias. Where softcap_slope is not null it receives the derivative of the
// softcap, 1 - tanh^2, as a tile of its own.
static __attribute__((noinline)) void change_scores(const AttentionParams& p, const Lanes& lanes,
                                                    int64_t first_key, int keys, float* tile,
                                                    float* softcap_slope) {
  const bool purely_causal = p.window_left < 0 && p.window_right == 0;
  const Scales scales = Scales::of(p);
  for (int lane = 0; lane < lanes.vectors * kLanes; lane += kLanes) {
    const Float slope = load(lanes.slope + lane);
    const Int diagonal = (Int)load_words(lanes.diagonal + lane);
    for (int key = 0; key < keys; ++key) {
      float* at = tile + key * kPanel + lane;
      Float x = load(at);
      if (p.softcap > 0) {
        const Float t = tanh(x * scales.argument);
        if (softcap_slope) store(softcap_slope + (at - tile), 1.0f - t * t);
        x = t * scales.cap;
      } else {
        x = x * scales.logit;
      }
      if (p.alibi_slopes) {
        const Int column = broadcast(static_cast<int32_t>(first_key + key));
        const Int beside = column - diagonal;
        const Int distance = purely_causal ? column : (beside < 0 ? beside : -beside);
        x = multiply_add(slope, __builtin_convertvector(distance, Float), x);
      }
      store(at, x);
    }
  }
  if (p.bias) add_bias(p, lanes, first_key, keys, tile);
}

// -inf where a row does not see the key. Keys between lanes.all's ends need no look.
ANYFLASH_INLINE void hide(const Lanes& lanes, int64_t first_key, int keys, float* tile) {
  for (int key = 0; key < keys; ++key) {
    const int64_t column = first_key + key;
    if (lanes.all.begin <= column && column < lanes.all.end) continue;
    const Int columns = broadcast(static_cast<int32_t>(column));
    for (int lane = 0; lane < lanes.vectors * kLanes; lane += kLanes) {
      const Int begin = (Int)load_words(lanes.key_begin + lane);
      const Int end = (Int)load_words(lanes.key_end + lane);
      float* at = tile + key * kPanel + lane;
      store(at, select((begin <= columns) & (columns < end), load(at), broadcast(-kInfinity)));
    }
  }
}

// The largest score of each lane.
ANYFLASH_INLINE void find_maxima(const float* tile, int keys, int vectors, float* maxima) {
  for (int lane = 0; lane < vectors * kLanes; lane += kLanes) {
    Float largest = broadcast(-kInfinity);
    for (int key = 0; key < keys; ++key) {
      largest = maximum(largest, load(tile + key * kPanel + lane));
    }
    store(maxima + lane, largest);
  }
}

// Dot products to what exponent_scale is for; `maxima` of each lane are found again where the tile
// changed.
ANYFLASH_INLINE void finish_scores(const AttentionParams& p, const Lanes& lanes, int64_t first_key,
                                   int keys, float* tile, float* maxima) {
  const bool scaled = only_scaled(p);
  const bool inside = lanes.all.begin <= first_key && first_key + keys <= lanes.all.end;
  if (!scaled) change_scores(p, lanes, first_key, keys, tile, nullptr);
  if (!inside) hide(lanes, first_key, keys, tile);
  if (!scaled || !inside) find_maxima(tile, keys, lanes.vectors, maxima);
}

// mask[key][lane]: all bits where the probability is kept. Rows of the panel are neighbouring
// queries of one head and begin at a multiple of 16.
static __attribute__((noinline)) void dropout_mask(const AttentionParams& p,
                                                   const Sequence& sequence, const Lanes& lanes,
                                                   int64_t first_key, int keys, Word* mask) {
  const Dropout dropout = Dropout::of(p.rng_state, p.dropout_p);
  const auto bh = static_cast<uint32_t>(sequence.index * p.heads + lanes.head);
  for (int64_t corner = first_key / 16 * 16; corner < first_key + keys; corner += 16) {
    for (int lane = 0; lane < lanes.rows; lane += 16) {
      Word kept[16][16];
      for (uint32_t row = 0; row < 8; ++row) {
        for (uint32_t column = 0; column < 8; column += 2) {
          const PhiloxWords words =
              dropout.words(bh, static_cast<uint32_t>(lanes.query + lane) + row,
                            static_cast<uint32_t>(corner) + column);
          for (uint32_t half = 0; half < 8; ++half) {
            const uint32_t i = row + half / 4 * 8, j = column + half / 2 % 2 * 8 + half % 2;
            kept[j][i] = dropout.keeps(words, i, j) ? ~Word{0} : Word{0};
          }
        }
      }
      for (int j = 0; j < 16; ++j) {
        const int64_t key = corner + j - first_key;
        if (key >= 0 && key < keys) memcpy(mask + key * kPanel + lane, kept[j], sizeof(kept[j]));
      }
    }
  }
}

}  // namespace anyflash::cpu::ANYFLASH_ISA
