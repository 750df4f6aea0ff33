// Attention backward: an item owns a chunk of keys and walks all row panels that see it, five
// products per block of keys:
//
//   S^T = K Q^T, dP^T = V dO^T; P = exp2(S - lse), dS = P (dP - delta)
//   dV += P^T dO, dK += dS^T Q; dQ^T += K^T dS^T
//
// dK and dV are the item's own. dQ's panels are shared by the chunks of a row space and added to in
// the chunks' order (work.h), so the sums are the same for any number of threads. Panels are walked
// from the last one: under a causal mask the first chunks, which see all panels, are then out of
// the way of the next.
#pragma once

#include "kernels/cpu/forward.h"

namespace anyflash::cpu::ANYFLASH_ISA {

// Keys of an item at most: they and their gradients stay in the second-level cache.
constexpr int kMaxChunk = 4 * kBlock;

ANYFLASH_INLINE int64_t max_chunk_keys(const AttentionParams& p) {
  return larger(p.head_dim, p.head_dim_v) <= 64 ? kMaxChunk : kMaxChunk / 2;
}

// Rows of a panel as the backward meets them: along the lanes and across them.
struct GradientPanel {
  Lanes lanes;
  Word* q;            // [word of head_dim][lane]
  Word* dout;         // [word of head_dim_v][lane]
  Word* q_zipped;     // [row][column]
  Word* dout_zipped;  // [row][column]
  float* lse;         // log2; +inf for lanes without a row
  float* delta;
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

// Dot products to logits, with what the gradient needs beside them. Returns what the logits still
// have to be multiplied with.
ANYFLASH_INLINE float finish_gradient_scores(const AttentionParams& p, const Sequence& sequence,
                                             const Lanes& lanes, int64_t first, int keys,
                                             const GradientTiles& tiles) {
  if (p.dropout_p > 0) dropout_mask(p, sequence, lanes, first, keys, tiles.kept);
  const bool scaled = only_scaled(p);
  if (!scaled) {
    change_scores(p, lanes, first, keys, tiles.scores,
                  p.softcap > 0 ? tiles.softcap_slope : nullptr);
  }
  if (first < lanes.all.begin || lanes.all.end < first + keys) {
    hide(lanes, first, keys, tiles.scores);
  }
  return scaled ? Scales::of(p).logit : 1.0f;
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
  return finish_gradient_scores(p, sequence, lanes, block.first, block.count, tiles);
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
  clear_padding<Product>(panel.q_zipped, p.head_dim, columns);
  clear_padding<Product>(panel.dout_zipped, p.head_dim_v, columns_v);
  return panel;
}

ANYFLASH_INLINE void load_statistics(const BackwardPlan& plan, const RowSpace& rows,
                                     const Sequence& sequence, int64_t space, int64_t row_begin,
                                     GradientPanel& panel) {
  const AttentionParams& p = *plan.params;
  for (int r = 0; r < panel.lanes.vectors * kLanes; ++r) {
    panel.lse[r] = kInfinity;
    panel.delta[r] = 0;
    if (r >= panel.lanes.rows) continue;
    const int64_t query = rows.query(row_begin + r), head = rows.head(space, row_begin + r);
    panel.lse[r] = *statistic(p, p.lse, sequence, query, head) * kLog2e;
    panel.delta[r] = *statistic(p, plan.delta, sequence, query, head);
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
  return 4 * (2 * kPanel * (columns + 1) + 5 * kBlock * kPanel) + 64 * 16;
}

// Gradients as T, `scale` times the floats; rows of `columns` contiguous numbers.
template <class T>
ANYFLASH_INLINE void narrow_scaled(const float* row, int columns, float scale, T* out) {
  for (int i = 0; i < columns; i += kLanes) {
    store_some(out + i, load(row + i) * scale, columns - i);
  }
}

// A null dq is zeros; few rows lie as rows already.
template <class T>
ANYFLASH_INLINE void write_dq(const BackwardPlan& plan, const Sequence& sequence, int64_t space,
                              int64_t row_begin, const Lanes& lanes, const float* dq, bool few_rows,
                              Word* staging) {
  const AttentionParams& p = *plan.params;
  const int columns = static_cast<int>(p.head_dim);
  const int64_t stride = round_up(columns, kLanes);
  const float* rows = dq;
  if (dq == nullptr) {
    memset(staging, 0, sizeof(float) * static_cast<size_t>(lanes.rows * stride));
    rows = reinterpret_cast<float*>(staging);
  } else if (!few_rows) {
    as_rows(dq, columns, lanes.vectors, reinterpret_cast<float*>(staging));
    rows = reinterpret_cast<float*>(staging);
  }
  for (int r = 0; r < lanes.rows; ++r) {
    const int64_t query = plan.rows.query(row_begin + r);
    const int64_t head = plan.rows.head(space, row_begin + r);
    narrow_scaled(rows + r * stride, columns, static_cast<float>(p.softmax_scale),
                  query_row<T>(p, p.dq, sequence, query, head));
  }
}

// The keys of an item: both forms, and their gradients.
struct KeyChunk {
  Word* k;
  Word* v;
  Word* k_zipped;
  float* dk;  // [key][column], columns rounded up to whole vectors
  float* dv;
};

// How many items add to the panel before this one.
ANYFLASH_INLINE int64_t turn_of(const BackwardItem& item, const Lanes& lanes) {
  return item.key_begin / item.chunk_keys - lanes.some.begin / item.chunk_keys;
}

// What one block of keys and one panel add to the three gradients; kStart is how dq begins.
template <class Product, Start kStart>
ANYFLASH_INLINE void add_block(const AttentionParams& p, const GradientPanel& panel,
                               const GradientTiles& tiles, const KeyChunk& chunk, int64_t offset,
                               int keys, float* dq) {
  constexpr int kPerWord = Product::kPerWord, kTileRow = kPanel / kPerWord;
  const int head_dim = static_cast<int>(p.head_dim);
  const int columns = static_cast<int>(round_up(p.head_dim, kLanes));
  const int columns_v = static_cast<int>(round_up(p.head_dim_v, kLanes));
  const bool halves = kPerWord == 2;
  const Word* p_tile = halves ? tiles.p_halves : reinterpret_cast<Word*>(tiles.scores);
  const Word* ds_tile = halves ? tiles.ds_halves : reinterpret_cast<Word*>(tiles.dp);
  const float* ds_pairs = halves ? tiles.scores : tiles.dp;
  const int row_steps = (panel.lanes.rows + kPerWord - 1) / kPerWord;
  const int key_steps = (keys + kPerWord - 1) / kPerWord;
  multiply_wide<Product, Start::add>(
      columns_v, {p_tile, kTileRow, 1, panel.dout_zipped, columns_v, chunk.dv + offset * columns_v,
                  columns_v, keys, row_steps});
  multiply_wide<Product, Start::add>(
      columns, {ds_tile, kTileRow, 1, panel.q_zipped, columns, chunk.dk + offset * columns, columns,
                keys, row_steps});
  multiply<Product, kStart, false>(
      panel.lanes.vectors,
      {chunk.k_zipped + offset / kPerWord * head_dim, 1, head_dim,
       reinterpret_cast<const Word*>(ds_pairs), kPanel, dq, kPanel, head_dim, key_steps});
}

// ---- A panel of up to kFewRows rows: vectors along head_dim, keys and values straight from where
// they lie. The tiles and all that is done to the scores stay the same. Queries and dout are float
// rows in the panel's zipped memory, dq is rows as well.

constexpr int kFewRows = 4;

template <class T>
ANYFLASH_INLINE void load_few_rows(const AttentionParams& p, const RowSpace& rows, const Rows& x,
                                   const Sequence& sequence, int64_t space, int count,
                                   int64_t head_dim, Word* out) {
  const int64_t columns = round_up(head_dim, kLanes);
  if (count == 3 || columns != head_dim) {  // three rows are computed as four
    memset(out, 0, sizeof(float) * static_cast<size_t>(kFewRows * columns));
  }
  for (int r = 0; r < count; ++r) {
    widen_row(query_row<const T>(p, x, sequence, rows.query(r), rows.head(space, r)),
              static_cast<int>(head_dim), reinterpret_cast<float*>(out) + r * columns);
  }
}

// tile[key][r] = sum over columns of x[r] * keys[key]
template <class T, int kRows>
ANYFLASH_INLINE void few_row_products(const Word* x, const T* const* keys, int count, int head_dim,
                                      float* tile) {
  const auto* rows = reinterpret_cast<const float*>(x);
  const int64_t columns = round_up(head_dim, kLanes);
  for (int key = 0; key < count; ++key) {
    Float products[kRows] = {};
    for (int i = 0; i < head_dim; i += kLanes) {
      const Float y = load_some(keys[key] + i, head_dim - i);
      for (int r = 0; r < kRows; ++r) {
        products[r] = multiply_add(load(rows + r * columns + i), y, products[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) tile[key * kPanel + r] = sum(products[r]);
  }
}

// sums[key] += sum over rows of tile[key][r] * x[r]
template <int kRows>
ANYFLASH_INLINE void add_to_keys(const float* tile, const Word* x, int count, int64_t columns,
                                 float* sums) {
  const auto* rows = reinterpret_cast<const float*>(x);
  for (int64_t i = 0; i < columns; i += kLanes) {
    Float y[kRows];
    for (int r = 0; r < kRows; ++r) y[r] = load(rows + r * columns + i);
    for (int key = 0; key < count; ++key) {
      Float total = load(sums + key * columns + i);
      for (int r = 0; r < kRows; ++r) {
        total = multiply_add(broadcast(tile[key * kPanel + r]), y[r], total);
      }
      store(sums + key * columns + i, total);
    }
  }
}

// dq[r] += sum over keys of tile[key][r] * keys[key]
template <class T, int kRows>
ANYFLASH_INLINE void add_to_rows(const float* tile, const T* const* keys, int count, int head_dim,
                                 float* dq) {
  const int64_t columns = round_up(head_dim, kLanes);
  for (int i = 0; i < head_dim; i += kLanes) {
    Float totals[kRows];
    for (int r = 0; r < kRows; ++r) totals[r] = load(dq + r * columns + i);
    for (int key = 0; key < count; ++key) {
      const Float y = load_some(keys[key] + i, head_dim - i);
      for (int r = 0; r < kRows; ++r) {
        totals[r] = multiply_add(broadcast(tile[key * kPanel + r]), y, totals[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) store(dq + r * columns + i, totals[r]);
  }
}

template <class T, int kRows>
static __attribute__((noinline)) void add_few_rows(
    const BackwardPlan& plan, const BackwardItem& item, const Sequence& sequence,
    const GradientPanel& panel, const GradientTiles& tiles, const KeyChunk& chunk,
    const T* const* k, const T* const* v, float* dq) {
  const AttentionParams& p = *plan.params;
  const int head_dim = static_cast<int>(p.head_dim), head_dim_v = static_cast<int>(p.head_dim_v);
  const int64_t columns = round_up(head_dim, kLanes), columns_v = round_up(head_dim_v, kLanes);
  const int64_t end = smaller(item.key_end, panel.lanes.some.end);
  for (int64_t first = larger(item.key_begin, panel.lanes.some.begin); first < end;
       first += kBlock) {
    const int keys = static_cast<int>(smaller<int64_t>(kBlock, end - first));
    const int64_t offset = first - item.key_begin;
    few_row_products<T, kRows>(panel.q_zipped, k + offset, keys, head_dim, tiles.scores);
    few_row_products<T, kRows>(panel.dout_zipped, v + offset, keys, head_dim_v, tiles.dp);
    const float factor = finish_gradient_scores(p, sequence, panel.lanes, first, keys, tiles);
    gradient_tiles<Fp32Product>(p, panel, keys, factor, tiles);
    add_to_keys<kRows>(tiles.scores, panel.dout_zipped, keys, columns_v,
                       chunk.dv + offset * columns_v);
    add_to_keys<kRows>(tiles.dp, panel.q_zipped, keys, columns, chunk.dk + offset * columns);
    add_to_rows<T, kRows>(tiles.dp, k + offset, keys, head_dim, dq);
  }
}

template <class T>
ANYFLASH_INLINE float* add_few_rows_in_turn(const BackwardPlan& plan, const BackwardItem& item,
                                            const Sequence& sequence, int64_t space,
                                            GradientPanel& panel, const GradientTiles& tiles,
                                            const KeyChunk& chunk, const T* const* k,
                                            const T* const* v, int64_t panel_number) {
  const AttentionParams& p = *plan.params;
  const int count = panel.lanes.rows;
  load_few_rows<T>(p, plan.rows, p.q, sequence, space, count, p.head_dim, panel.q_zipped);
  load_few_rows<T>(p, plan.rows, p.dout, sequence, space, count, p.head_dim_v, panel.dout_zipped);
  load_statistics(plan, plan.rows, sequence, space, 0, panel);
  const int64_t turn = turn_of(item, panel.lanes);
  float* dq = wait_for_turn(*plan.panels, panel_number, turn);
  if (turn == 0) {
    memset(dq, 0, sizeof(float) * static_cast<size_t>(kFewRows * round_up(p.head_dim, kLanes)));
  }
  if (count == 1) {
    add_few_rows<T, 1>(plan, item, sequence, panel, tiles, chunk, k, v, dq);
  } else if (count == 2) {
    add_few_rows<T, 2>(plan, item, sequence, panel, tiles, chunk, k, v, dq);
  } else {
    add_few_rows<T, kFewRows>(plan, item, sequence, panel, tiles, chunk, k, v, dq);
  }
  return dq;
}

// ---- An item.

// All blocks of an item's keys that the panel sees. Waits for the panel's turn as late as it can.
template <class Product>
ANYFLASH_INLINE float* add_panel(const BackwardPlan& plan, const BackwardItem& item,
                                 const Sequence& sequence, const GradientPanel& panel,
                                 const GradientTiles& tiles, const KeyChunk& chunk,
                                 int64_t panel_number) {
  const AttentionParams& p = *plan.params;
  const TileRange<int64_t>& seen = panel.lanes.some;
  const int64_t begin = larger(item.key_begin, seen.begin);
  const int64_t end = smaller(item.key_end, seen.end);
  const int64_t turn = turn_of(item, panel.lanes);
  const int block_keys = balanced_block(item.key_end - item.key_begin);
  float* dq = nullptr;
  for (int64_t first = item.key_begin; first < end; first += block_keys) {
    // Keys outside of what the panel sees are left out; zipped rows begin at even keys.
    const int64_t skipped = larger<int64_t>(0, begin - first) & -Product::kPerWord;
    const int keys = static_cast<int>(smaller<int64_t>(block_keys, end - first) - skipped);
    if (keys <= 0) continue;
    const int64_t offset = first + skipped - item.key_begin;
    const GradientBlock block{chunk.k + offset * words_per_row<Product>(p.head_dim),
                              chunk.v + offset * words_per_row<Product>(p.head_dim_v),
                              first + skipped, keys};
    const float factor = score_products<Product>(p, sequence, panel, block, tiles);
    gradient_tiles<Product>(p, panel, keys, factor, tiles);
    const bool first_of_all = dq == nullptr && turn == 0;
    if (dq == nullptr) dq = wait_for_turn(*plan.panels, panel_number, turn);
    if (first_of_all) {
      add_block<Product, Start::zero>(p, panel, tiles, chunk, offset, keys, dq);
    } else {
      add_block<Product, Start::add>(p, panel, tiles, chunk, offset, keys, dq);
    }
  }
  return dq;
}

template <class T>
static void backward_item(const BackwardPlan& plan, const BackwardItem& item, char* memory) {
  using Product = typename ProductOf<T>::Type;
  const AttentionParams& p = *plan.params;
  const Sequence sequence(p, item.sequence);
  const int64_t kv_head = item.space * plan.rows.heads / (p.heads / p.heads_k);
  const int head_dim = static_cast<int>(p.head_dim), head_dim_v = static_cast<int>(p.head_dim_v);
  const int64_t columns = round_up(head_dim, kLanes), columns_v = round_up(head_dim_v, kLanes);
  const int keys = static_cast<int>(item.key_end - item.key_begin);

  Scratch scratch{memory};
  KeyChunk chunk;
  chunk.k = scratch.take<Word>(keys * words_per_row<Product>(head_dim));
  chunk.v = scratch.take<Word>(keys * words_per_row<Product>(head_dim_v));
  chunk.k_zipped = Product::kPerWord == 1 ? chunk.k : scratch.take<Word>((keys + 1) / 2 * head_dim);
  chunk.dk = scratch.take<float>(keys * columns);
  chunk.dv = scratch.take<float>(keys * columns_v);
  Word* staging = scratch.take<Word>(kPanel * larger(columns, columns_v));
  const GradientTiles tiles = take_tiles<Product>(p, scratch);
  GradientPanel panel = take_panel<Product>(p, scratch);

  const int64_t num_rows = sequence.mask.seqlen_q * plan.rows.heads;
  const int64_t num_panels = (num_rows + kPanel - 1) / kPanel;
  const bool few_rows = num_rows <= kFewRows;
  const T *k_rows[kMaxChunk], *v_rows[kMaxChunk];
  find_key_rows(p, p.k, sequence, kv_head, item.key_begin, keys, k_rows);
  find_key_rows(p, p.v, sequence, kv_head, item.key_begin, keys, v_rows);
  if (!few_rows) {
    words_along_rows<Product>(k_rows, keys, head_dim, chunk.k);
    if (Product::kPerWord > 1) {
      zipped_rows<Product>(k_rows, keys, head_dim, head_dim, chunk.k_zipped);
    }
    words_along_rows<Product>(v_rows, keys, head_dim_v, chunk.v);
  }
  memset(chunk.dk, 0, sizeof(float) * static_cast<size_t>(keys * columns));
  memset(chunk.dv, 0, sizeof(float) * static_cast<size_t>(keys * columns_v));

  for (int64_t i = item.num_spaces * num_panels - 1; i >= 0; --i) {
    const int64_t space = item.space + i / num_panels, row_begin = i % num_panels * kPanel;
    describe_lanes(p, plan.rows, sequence, space, row_begin, num_rows, panel.lanes);
    const Lanes& lanes = panel.lanes;
    const TileRange<int64_t>& seen = lanes.some;
    if (larger(item.key_begin, seen.begin) >= smaller(item.key_end, seen.end)) {
      const bool nobody_comes = seen.begin >= seen.end;
      if (nobody_comes && item.key_begin == 0) {
        write_dq<T>(plan, sequence, space, row_begin, lanes, nullptr, few_rows, staging);
      }
      continue;
    }
    const int64_t panel_number = item.first_panel + i;
    const float* dq;
    if (few_rows) {
      dq = add_few_rows_in_turn<T>(plan, item, sequence, space, panel, tiles, chunk, k_rows, v_rows,
                                   panel_number);
    } else {
      load_panel<Product, T>(plan, plan.rows, sequence, space, row_begin, staging, panel);
      dq = add_panel<Product>(plan, item, sequence, panel, tiles, chunk, panel_number);
    }
    const bool last = seen.end <= item.key_end;
    if (last) write_dq<T>(plan, sequence, space, row_begin, lanes, dq, few_rows, staging);
    pass_on(*plan.panels, panel_number, last);
  }

  const bool packed = p.cu_seqlens_k != nullptr;
  for (int key = 0; key < keys; ++key) {
    const int64_t row = sequence.k_row + item.key_begin + key;
    narrow_scaled(chunk.dk + key * columns, head_dim, static_cast<float>(p.softmax_scale),
                  row_of<T>(p.dk, packed, sequence.index, row, kv_head));
    narrow_scaled(chunk.dv + key * columns_v, head_dim_v, 1.0f,
                  row_of<T>(p.dv, packed, sequence.index, row, kv_head));
  }
}

template <class T>
static int64_t backward_scratch_bytes(const BackwardPlan& plan) {
  using Product = typename ProductOf<T>::Type;
  const AttentionParams& p = *plan.params;
  const int64_t columns = round_up(p.head_dim, kLanes), columns_v = round_up(p.head_dim_v, kLanes);
  return 4 * (max_chunk_keys(p) * (3 * columns + 2 * columns_v) +
              kPanel * larger(columns, columns_v)) +
         panel_and_tiles_bytes<Product>(p);
}

// delta = sum(dout * out) - dlse of queries [begin, end), all heads.
template <class T>
static void delta_rows(const BackwardPlan& plan, int64_t sequence_index, int64_t begin,
                       int64_t end) {
  const AttentionParams& p = *plan.params;
  const Sequence sequence(p, sequence_index);
  const int columns = static_cast<int>(p.head_dim_v);
  for (int64_t head = 0; head < p.heads; ++head) {
    for (int64_t query = begin; query < end; ++query) {
      const T* dout = query_row<const T>(p, p.dout, sequence, query, head);
      const T* out = query_row<const T>(p, p.out, sequence, query, head);
      Float products{};
      for (int i = 0; i < columns; i += kLanes) {
        products = multiply_add(load_some(dout + i, columns - i), load_some(out + i, columns - i),
                                products);
      }
      const float dlse = p.dlse.data ? *statistic(p, p.dlse, sequence, query, head) : 0.0f;
      *statistic(p, plan.delta, sequence, query, head) = sum(products) - dlse;
    }
  }
}

// dsink = -sum over rows of p_sink * delta. A row without keys has lse +inf and weighs nothing.
static __attribute__((noinline)) void sink_gradient(const BackwardPlan& plan, int64_t head) {
  const AttentionParams& p = *plan.params;
  const Float sink = broadcast(p.sinks[head] * kLog2e);
  Float total{};
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence sequence(p, b);
    const int64_t queries = sequence.mask.seqlen_q;
    for (int64_t query = 0; query < queries; query += kLanes) {
      const int count = static_cast<int>(smaller<int64_t>(kLanes, queries - query));
      const Float lse = load_some(statistic(p, p.lse, sequence, query, head), count);
      const Float delta = load_some(statistic(p, plan.delta, sequence, query, head), count);
      const Float weight = exp2<6>(sink - lse * kLog2e);
      // Lanes without a row have delta 0, but any weight.
      total = total - select(delta == Float{}, Float{}, weight * delta);
    }
  }
  p.dsinks[head] = sum(total);
}

// The gradient of a tile of the bias: an item owns at most kBlock keys x kPanel queries of dbias,
// and visits every sequence, head, query and key that these stand for. S and dP are computed once
// more, which a broadcast bias costs anyway, and no sum depends on who computes what when.
template <class T>
static void bias_item(const BackwardPlan& plan, const BiasItem& item, char* memory) {
  using Product = typename ProductOf<T>::Type;
  const AttentionParams& p = *plan.params;
  const int head_dim = static_cast<int>(p.head_dim), head_dim_v = static_cast<int>(p.head_dim_v);
  const int words = words_per_row<Product>(head_dim), words_v = words_per_row<Product>(head_dim_v);
  const bool one_query = p.dbias_stride[2] == 0, one_key = p.dbias_stride[3] == 0;

  Scratch scratch{memory};
  Word* k = scratch.take<Word>(kBlock * words);
  Word* v = scratch.take<Word>(kBlock * words_v);
  float* sums = scratch.take<float>(kBlock * kPanel);
  Word* staging = scratch.take<Word>(kPanel * round_up(larger(head_dim, head_dim_v), kLanes));
  const GradientTiles tiles = take_tiles<Product>(p, scratch);
  GradientPanel panel = take_panel<Product>(p, scratch);
  memset(sums, 0, sizeof(float) * kBlock * kPanel);

  const RowSpace rows_of_one_head{1};
  for (int64_t b = item.sequence.begin; b < item.sequence.end; ++b) {
    const Sequence sequence(p, b);
    const int64_t query_end = smaller(item.query.end, sequence.mask.seqlen_q);
    for (int64_t head = item.head.begin; head < item.head.end; ++head) {
      const int64_t kv_head = head / (p.heads / p.heads_k);
      for (int64_t row = item.query.begin; row < query_end; row += kPanel) {
        describe_lanes(p, rows_of_one_head, sequence, head, row, query_end, panel.lanes);
        const Lanes& lanes = panel.lanes;
        const int64_t begin = larger(item.key.begin, lanes.some.begin);
        const int64_t end = smaller(item.key.end, lanes.some.end);
        if (begin >= end) continue;
        load_panel<Product, T>(plan, rows_of_one_head, sequence, head, row, staging, panel);
        for (int64_t first = begin; first < end; first += kBlock) {
          const int count = static_cast<int>(smaller<int64_t>(kBlock, end - first));
          const T* rows[kBlock];
          find_key_rows(p, p.k, sequence, kv_head, first, count, rows);
          words_along_rows<Product>(rows, count, head_dim, k);
          find_key_rows(p, p.v, sequence, kv_head, first, count, rows);
          words_along_rows<Product>(rows, count, head_dim_v, v);
          const GradientBlock block{k, v, first, count};
          const float factor = score_products<Product>(p, sequence, panel, block, tiles);
          const int64_t offset = one_key ? 0 : first - item.key.begin;
          for (int key = 0; key < count; ++key) {
            for (int lane = 0; lane < lanes.vectors * kLanes; lane += kLanes) {
              const Gradient g =
                  gradient_at<Product>(p, tiles, int64_t{key} * kPanel + lane, factor,
                                       load(panel.lse + lane), load(panel.delta + lane));
              float* at = sums + (one_key ? 0 : offset + key) * kPanel + lane;
              store(at, load(at) + g.ds);
            }
          }
        }
      }
    }
  }
  float* out =
      p.dbias + item.sequence.begin * p.dbias_stride[0] + item.head.begin * p.dbias_stride[1];
  const int64_t keys = one_key ? 1 : item.key.end - item.key.begin;
  const int64_t queries = one_query ? 1 : item.query.end - item.query.begin;
  for (int64_t key = 0; key < keys; ++key) {
    for (int64_t query = 0; query < queries; ++query) {
      float total = sums[key * kPanel + query];
      if (one_query) {
        for (int lane = 1; lane < kPanel; ++lane) total += sums[key * kPanel + lane];
      }
      out[(one_query ? 0 : item.query.begin + query) * p.dbias_stride[2] +
          (one_key ? 0 : item.key.begin + key) * p.dbias_stride[3]] = total;
    }
  }
}

template <class T>
static int64_t bias_scratch_bytes(const BackwardPlan& plan) {
  using Product = typename ProductOf<T>::Type;
  const AttentionParams& p = *plan.params;
  const int64_t columns = round_up(p.head_dim, kLanes), columns_v = round_up(p.head_dim_v, kLanes);
  return 4 * (kBlock * (columns + columns_v + kPanel) + kPanel * larger(columns, columns_v)) +
         panel_and_tiles_bytes<Product>(p);
}

}  // namespace anyflash::cpu::ANYFLASH_ISA
