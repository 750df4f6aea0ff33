// What the backward kernels share: a panel of rows in the two forms the products need, and the
// tiles that turn dot products into P and the gradient of the logits.
#pragma once

#include "kernels/cpu/forward.h"

namespace anyflash::cpu::ANYFLASH_ISA {

// Rows of a panel as the backward meets them: along the lanes and across them.
struct GradientPanel {
  Lanes lanes;
  Word* q;            // [word of head_dim][lane]
  Word* dout;         // [word of head_dim_v][lane]
  Word* q_zipped;     // [row][column]
  Word* dout_zipped;  // [row][column]
  float* lse;         // log2; +inf for lanes without a row; of far rows, the remainder
  float* delta;
  float* reference;  // of far rows, else 0
  bool far;          // some row is
};

// Tiles [key][lane] of one block of keys and one panel.
struct GradientTiles {
  float* scores;  // then P
  float* dp;      // then dS
  float* softcap_slope;
  Word* kept;
  Word* p_halves;  // bf16 products: P and dS as bf16 along the lanes
  Word* ds_halves;
};

// One block of keys: along rows, and zipped.
struct GradientBlock {
  const Word* keys;
  const Word* values;
  int64_t first;
  int count;
};

// Scores to exponents beside the rows' references.
static __attribute__((noinline)) void subtract_references(const GradientPanel& panel, int keys,
                                                          float scale, float* tile) {
  for (int lane = 0; lane < panel.lanes.vectors * kLanes; lane += kLanes) {
    const Float reference = load(panel.reference + lane);
    for (int key = 0; key < keys; ++key) {
      float* at = tile + key * kPanel + lane;
      store(at, (load(at) - reference) * scale);
    }
  }
}

// Dot products to logits, with what the gradient needs beside them. Returns what makes exponents of
// them.
ANYFLASH_INLINE float finish_gradient_scores(const AttentionParams& p, const Sequence& sequence,
                                             const GradientPanel& panel, int64_t first, int keys,
                                             const GradientTiles& tiles) {
  const Lanes& lanes = panel.lanes;
  if (p.dropout_p > 0) dropout_mask(p, sequence, lanes, first, keys, tiles.kept);
  const bool scaled = only_scaled(p);
  if (!scaled) {
    change_scores(p, lanes, first, keys, tiles.scores,
                  p.softcap > 0 ? tiles.softcap_slope : nullptr);
  }
  if (first < lanes.all.begin || lanes.all.end < first + keys) {
    hide(lanes, first, keys, tiles.scores);
  }
  if (!panel.far) return exponent_scale(p);
  subtract_references(panel, keys, exponent_scale(p), tiles.scores);
  return 1.0f;
}

// S and dP, not yet functions of each other.
template <class Product>
ANYFLASH_INLINE float score_products(const AttentionParams& p, const Sequence& sequence,
                                     const GradientPanel& panel, const GradientBlock& block,
                                     const GradientTiles& tiles) {
  const int words = words_per_row<Product>(p.head_dim);
  const int words_v = words_per_row<Product>(p.head_dim_v);
  const Lanes& lanes = panel.lanes;
  multiply<Product, Start::zero, false>(lanes.vectors, {block.keys, words, 1, panel.q, kPanel,
                                                        tiles.scores, kPanel, block.count, words});
  multiply<Product, Start::zero, false>(
      lanes.vectors,
      {block.values, words_v, 1, panel.dout, kPanel, tiles.dp, kPanel, block.count, words_v});
  return finish_gradient_scores(p, sequence, panel, block.first, block.count, tiles);
}

struct Gradient {
  Float p;   // after dropout
  Float ds;  // of the logit
};

template <class Product>
ANYFLASH_INLINE Gradient gradient_at(const AttentionParams& p, const GradientTiles& tiles,
                                     int64_t at, float factor, Float lse, Float delta) {
  const Float weight = exp2<Product::kExp2Degree>(load(tiles.scores + at) * factor - lse);
  Float dp = load(tiles.dp + at), dropped = weight;
  if (p.dropout_p > 0) {
    const Words kept = load_words(tiles.kept + at);
    const float grown = static_cast<float>(1.0 / (1.0 - p.dropout_p));
    dropped = (Float)((Words)weight & kept) * grown;
    dp = (Float)((Words)dp & kept) * grown;
  }
  return {dropped, weight * (dp - delta)};
}

// Tiles become P and the gradient of the scaled dot products: floats in place, or bf16 halves along
// the lanes and, in `scores`, dS in pairs of keys.
template <class Product>
ANYFLASH_INLINE void gradient_tiles(const AttentionParams& p, const GradientPanel& panel, int keys,
                                    float factor, const GradientTiles& tiles) {
  for (int lane = 0; lane < panel.lanes.vectors * kLanes; lane += kLanes) {
    const Float lse = load(panel.lse + lane), delta = load(panel.delta + lane);
    const auto at_key = [&](int key) __attribute__((always_inline)) {
      const int64_t at = int64_t{key} * kPanel + lane;
      Gradient g = gradient_at<Product>(p, tiles, at, factor, lse, delta);
      if (p.softcap > 0) g.ds = g.ds * load(tiles.softcap_slope + at);
      if constexpr (Product::kPerWord == 1) {
        store(tiles.scores + at, g.p);
        store(tiles.dp + at, g.ds);
      } else {
        store(reinterpret_cast<Bf16*>(tiles.p_halves) + at, g.p);
        store(reinterpret_cast<Bf16*>(tiles.ds_halves) + at, g.ds);
      }
      return g.ds;
    };
    for (int key = 0; key < keys; key += Product::kPerWord) {
      const Float ds = at_key(key);
      if constexpr (Product::kPerWord == 2) {
        const Float next = key + 1 < keys ? at_key(key + 1) : Float{};
        store_words(tiles.scores + key / 2 * kPanel + lane, bf16_pairs(ds, next));
      }
    }
  }
}

// Both forms of the panel's rows of q or dout.
template <class Product, class T>
ANYFLASH_INLINE void load_both_ways(const AttentionParams& p, const RowSpace& rows, const Rows& x,
                                    const Sequence& sequence, int64_t space, int64_t row_begin,
                                    int count, int head_dim, Word* staging, Word* along,
                                    Word* zipped) {
  const int words = words_per_row<Product>(head_dim);
  const int64_t columns = round_up(head_dim, kLanes);
  const T* row[kPanel];
  for (int r = 0; r < count; ++r) {
    row[r] = query_row<const T>(p, x, sequence, rows.query(row_begin + r),
                                rows.head(space, row_begin + r));
  }
  zipped_rows<Product>(row, count, head_dim, static_cast<int>(columns), zipped);
  if constexpr (Product::kPerWord == 1) {
    transpose(zipped, columns, count, words, along, kPanel);
  } else {
    words_along_rows<Product>(row, count, head_dim, staging);
    transpose(staging, words, count, words, along, kPanel);
  }
}

// Columns behind head_dim, which nobody writes again.
template <class Product>
ANYFLASH_INLINE void clear_padding(Word* zipped, int64_t head_dim, int64_t columns) {
  if (head_dim == columns) return;
  for (int row = 0; row < kPanel / Product::kPerWord; ++row) {
    for (int64_t i = head_dim; i < columns; ++i) zipped[row * columns + i] = 0;
  }
}

// Memory of one panel.
template <class Product>
ANYFLASH_INLINE GradientPanel take_panel(const AttentionParams& p, Scratch& scratch) {
  const int64_t columns = round_up(p.head_dim, kLanes), columns_v = round_up(p.head_dim_v, kLanes);
  GradientPanel panel;
  panel.q = scratch.take<Word>(words_per_row<Product>(p.head_dim) * kPanel);
  panel.dout = scratch.take<Word>(words_per_row<Product>(p.head_dim_v) * kPanel);
  panel.q_zipped = scratch.take<Word>(kPanel / Product::kPerWord * columns);
  panel.dout_zipped = scratch.take<Word>(kPanel / Product::kPerWord * columns_v);
  panel.lse = scratch.take<float>(kPanel);
  panel.delta = scratch.take<float>(kPanel);
  panel.reference = scratch.take<float>(kPanel);
  clear_padding<Product>(panel.q_zipped, p.head_dim, columns);
  clear_padding<Product>(panel.dout_zipped, p.head_dim_v, columns_v);
  return panel;
}

ANYFLASH_INLINE void load_statistics(const BackwardPlan& plan, const RowSpace& rows,
                                     const Sequence& sequence, int64_t space, int64_t row_begin,
                                     GradientPanel& panel) {
  const AttentionParams& p = *plan.params;
  panel.far = false;
  for (int r = 0; r < panel.lanes.vectors * kLanes; ++r) {
    panel.lse[r] = kInfinity;
    panel.delta[r] = panel.reference[r] = 0;
    if (r >= panel.lanes.rows) continue;
    const int64_t query = rows.query(row_begin + r), head = rows.head(space, row_begin + r);
    panel.lse[r] = *statistic(p, p.lse, sequence, query, head) * kLog2e;
    panel.delta[r] = *statistic(p, plan.delta, sequence, query, head);
    if (plan.reference.data == nullptr) continue;
    panel.reference[r] = *statistic(p, plan.reference, sequence, query, head);
    panel.lse[r] = *statistic(p, plan.remainder, sequence, query, head);
    panel.far |= panel.reference[r] != 0;
  }
}

template <class Product, class T>
ANYFLASH_INLINE void load_panel(const BackwardPlan& plan, const RowSpace& rows,
                                const Sequence& sequence, int64_t space, int64_t row_begin,
                                Word* staging, GradientPanel& panel) {
  const AttentionParams& p = *plan.params;
  const int count = panel.lanes.rows;
  load_both_ways<Product, T>(p, rows, p.q, sequence, space, row_begin, count,
                             static_cast<int>(p.head_dim), staging, panel.q, panel.q_zipped);
  load_both_ways<Product, T>(p, rows, p.dout, sequence, space, row_begin, count,
                             static_cast<int>(p.head_dim_v), staging, panel.dout,
                             panel.dout_zipped);
  load_statistics(plan, rows, sequence, space, row_begin, panel);
}

template <class Product>
ANYFLASH_INLINE GradientTiles take_tiles(const AttentionParams& p, Scratch& scratch) {
  constexpr int kTile = kBlock * kPanel, kHalves = Product::kPerWord == 2 ? kTile / 2 : 0;
  GradientTiles tiles;
  tiles.scores = scratch.take<float>(kTile);
  tiles.dp = scratch.take<float>(kTile);
  tiles.softcap_slope = scratch.take<float>(p.softcap > 0 ? kTile : 0);
  tiles.kept = scratch.take<Word>(p.dropout_p > 0 ? kTile : 0);
  tiles.p_halves = scratch.take<Word>(kHalves);
  tiles.ds_halves = scratch.take<Word>(kHalves);
  return tiles;
}

template <class Product>
ANYFLASH_INLINE int64_t panel_and_tiles_bytes(const AttentionParams& p) {
  const int64_t columns = round_up(p.head_dim, kLanes) + round_up(p.head_dim_v, kLanes);
  return 4 * (kPanel * (2 * columns + 3) + 5 * kBlock * kPanel) + 64 * 17;
}

}  // namespace anyflash::cpu::ANYFLASH_ISA
