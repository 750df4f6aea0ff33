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

constexpr int kChunk = 2 * kBlock;  // keys of an item

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
  if (p.dropout_p > 0) {
    dropout_mask(p, sequence, lanes, block.first, block.count, tiles.kept);
  }
  const bool scaled = only_scaled(p);
  if (!scaled) {
    change_scores(p, lanes, block.first, block.count, tiles.scores,
                  p.softcap > 0 ? tiles.softcap_slope : nullptr);
  }
  if (block.first < lanes.all.begin || lanes.all.end < block.first + block.count) {
    hide(lanes, block.first, block.count, tiles.scores);
  }
  return scaled ? Scales::of(p).logit : 1.0f;
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

// Memory of one panel; the columns behind head_dim stay 0.
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
  memset(panel.q_zipped, 0, sizeof(Word) * kPanel / Product::kPerWord * columns);
  memset(panel.dout_zipped, 0, sizeof(Word) * kPanel / Product::kPerWord * columns_v);
  return panel;
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
  for (int r = 0; r < kPanel; ++r) {
    panel.lse[r] = kInfinity;
    panel.delta[r] = 0;
    if (r >= count) continue;
    const int64_t query = rows.query(row_begin + r), head = rows.head(space, row_begin + r);
    panel.lse[r] = *statistic(p, p.lse, sequence, query, head) * kLog2e;
    panel.delta[r] = *statistic(p, plan.delta, sequence, query, head);
  }
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

// A null dq is zeros.
template <class T>
ANYFLASH_INLINE void write_dq(const BackwardPlan& plan, const Sequence& sequence, int64_t space,
                              int64_t row_begin, const Lanes& lanes, const float* dq,
                              Word* staging) {
  const AttentionParams& p = *plan.params;
  const int columns = static_cast<int>(p.head_dim);
  const int64_t stride = round_up(columns, kLanes);
  auto* rows = reinterpret_cast<float*>(staging);
  if (dq != nullptr) {
    as_rows(dq, columns, lanes.vectors, rows);
  } else {
    memset(rows, 0, sizeof(float) * static_cast<size_t>(lanes.rows * stride));
  }
  for (int r = 0; r < lanes.rows; ++r) {
    const int64_t query = plan.rows.query(row_begin + r);
    const int64_t head = plan.rows.head(space, row_begin + r);
    narrow_scaled(rows + r * stride, columns, static_cast<float>(p.softmax_scale),
                  query_row<T>(p, p.dq, sequence, query, head));
  }
}

template <class T>
static void backward_item(const BackwardPlan& plan, const BackwardItem& item, char* memory) {
  using Product = typename ProductOf<T>::Type;
  constexpr int kPerWord = Product::kPerWord;
  const AttentionParams& p = *plan.params;
  const Sequence sequence(p, item.sequence);
  const int64_t kv_head = item.space * plan.rows.heads / (p.heads / p.heads_k);
  const int head_dim = static_cast<int>(p.head_dim), head_dim_v = static_cast<int>(p.head_dim_v);
  const int words = words_per_row<Product>(head_dim), words_v = words_per_row<Product>(head_dim_v);
  const int columns = static_cast<int>(round_up(head_dim, kLanes));
  const int columns_v = static_cast<int>(round_up(head_dim_v, kLanes));
  const int keys = static_cast<int>(item.key_end - item.key_begin);

  Scratch scratch{memory};
  Word* k = scratch.take<Word>(kChunk * words);
  Word* v = scratch.take<Word>(kChunk * words_v);
  Word* k_zipped = kPerWord == 1 ? k : scratch.take<Word>(kChunk / kPerWord * head_dim);
  float* dk = scratch.take<float>(kChunk * columns);
  float* dv = scratch.take<float>(kChunk * columns_v);
  Word* staging = scratch.take<Word>(kPanel * larger(columns, columns_v));
  const GradientTiles tiles = take_tiles<Product>(p, scratch);
  GradientPanel panel = take_panel<Product>(p, scratch);

  const T* rows[kChunk];
  find_key_rows(p, p.k, sequence, kv_head, item.key_begin, keys, rows);
  words_along_rows<Product>(rows, keys, head_dim, k);
  if (kPerWord > 1) zipped_rows<Product>(rows, keys, head_dim, head_dim, k_zipped);
  find_key_rows(p, p.v, sequence, kv_head, item.key_begin, keys, rows);
  words_along_rows<Product>(rows, keys, head_dim_v, v);
  memset(dk, 0, sizeof(float) * static_cast<size_t>(keys) * columns);
  memset(dv, 0, sizeof(float) * static_cast<size_t>(keys) * columns_v);

  const int64_t num_rows = sequence.mask.seqlen_q * plan.rows.heads;
  const int64_t num_panels = (num_rows + kPanel - 1) / kPanel;
  const int64_t chunk = item.key_begin / kChunk;
  for (int64_t i = item.num_spaces * num_panels - 1; i >= 0; --i) {
    const int64_t space = item.space + i / num_panels, row_begin = i % num_panels * kPanel;
    describe_lanes(p, plan.rows, sequence, space, row_begin, num_rows, panel.lanes);
    const Lanes& lanes = panel.lanes;
    const int64_t begin = larger(item.key_begin, lanes.some.begin);
    const int64_t end = smaller(item.key_end, lanes.some.end);
    if (begin >= end) {
      const bool nobody_comes = lanes.some.begin >= lanes.some.end;
      if (nobody_comes && chunk == 0) {
        write_dq<T>(plan, sequence, space, row_begin, lanes, nullptr, staging);
      }
      continue;
    }
    load_panel<Product, T>(plan, plan.rows, sequence, space, row_begin, staging, panel);
    float* dq = nullptr;
    for (int64_t first = item.key_begin; first < end; first += kBlock) {
      // Keys outside of what the panel sees are left out; zipped rows begin at even keys.
      const int64_t skipped = larger<int64_t>(0, begin - first) & -kPerWord;
      const int count = static_cast<int>(smaller<int64_t>(kBlock, end - first) - skipped);
      if (count <= 0) continue;
      const int64_t offset = first + skipped - item.key_begin;
      const GradientBlock block{k + offset * words, v + offset * words_v, first + skipped, count};
      const float factor = score_products<Product>(p, sequence, panel, block, tiles);
      gradient_tiles<Product>(p, panel, count, factor, tiles);

      const bool packed = kPerWord == 2;
      const Word* p_tile = packed ? tiles.p_halves : reinterpret_cast<Word*>(tiles.scores);
      const Word* ds_tile = packed ? tiles.ds_halves : reinterpret_cast<Word*>(tiles.dp);
      const float* ds_pairs = packed ? tiles.scores : tiles.dp;
      constexpr int kTileRow = kPanel / kPerWord;
      const int row_steps = (lanes.rows + kPerWord - 1) / kPerWord;
      multiply_wide<Product, Start::add>(
          columns_v, {p_tile, kTileRow, 1, panel.dout_zipped, columns_v, dv + offset * columns_v,
                      columns_v, count, row_steps});
      multiply_wide<Product, Start::add>(
          columns, {ds_tile, kTileRow, 1, panel.q_zipped, columns, dk + offset * columns, columns,
                    count, row_steps});
      if (dq == nullptr) {
        const int64_t turn = chunk - lanes.some.begin / kChunk;
        dq = wait_for_turn(*plan.panels, item.first_panel + i, turn);
        if (turn == 0) memset(dq, 0, sizeof(float) * static_cast<size_t>(head_dim) * kPanel);
      }
      multiply<Product, Start::add, false>(
          lanes.vectors, {k_zipped + offset / kPerWord * head_dim, 1, head_dim,
                          reinterpret_cast<const Word*>(ds_pairs), kPanel, dq, kPanel, head_dim,
                          (count + kPerWord - 1) / kPerWord});
    }
    const bool last = chunk == (lanes.some.end - 1) / kChunk;
    if (last) {
      write_dq<T>(plan, sequence, space, row_begin, lanes, dq, staging);
    }
    pass_on(*plan.panels, item.first_panel + i, last);
  }

  for (int key = 0; key < keys; ++key) {
    const int64_t row = sequence.k_row + item.key_begin + key;
    const bool packed = p.cu_seqlens_k != nullptr;
    narrow_scaled(dk + int64_t{key} * columns, head_dim, static_cast<float>(p.softmax_scale),
                  row_of<T>(p.dk, packed, sequence.index, row, kv_head));
    narrow_scaled(dv + int64_t{key} * columns_v, head_dim_v, 1.0f,
                  row_of<T>(p.dv, packed, sequence.index, row, kv_head));
  }
}

template <class T>
static int64_t backward_scratch_bytes(const BackwardPlan& plan) {
  using Product = typename ProductOf<T>::Type;
  const AttentionParams& p = *plan.params;
  const int64_t columns = round_up(p.head_dim, kLanes), columns_v = round_up(p.head_dim_v, kLanes);
  return 4 * (kChunk * (3 * columns + 2 * columns_v) + kPanel * larger(columns, columns_v)) +
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
