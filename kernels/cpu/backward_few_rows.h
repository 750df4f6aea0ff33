// The backward of up to kFewRows rows: vectors along head_dim, keys and values straight from where
// they lie, as in decode.h. The tiles and all that is done to the scores stay the same. Queries and
// dout are float rows in the panel's zipped memory, dq is rows as well.
#pragma once

#include "kernels/cpu/gradient_tiles.h"

namespace anyflash::cpu::ANYFLASH_ISA {

// Keys of an item at most: they and their gradients stay in the second-level cache, but for head
// dims above 128 in AMX's tiles, which larger blocks make up for.
constexpr int kMaxChunk = 384;
static_assert(2 * kBlock <= kMaxChunk);

ANYFLASH_INLINE int64_t max_chunk_keys(const AttentionParams& p) {
  return larger(p.head_dim, p.head_dim_v) <= 64 ? kMaxChunk : 2 * kBlock;
}

// The keys of an item: along rows and, k, as the A of a product over keys; and their gradients.
struct KeyChunk {
  Word* k;
  Word* v;
  Word* k_over;
  OverKeys over;
  float* dk;  // [key][column], columns rounded up to whole vectors
  float* dv;
};

// How many items add to the panel before this one.
ANYFLASH_INLINE int64_t turn_of(const BackwardItem& item, const Lanes& lanes) {
  return item.key_begin / item.chunk_keys - lanes.some.begin / item.chunk_keys;
}

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

// dq[r] += sum over keys of tile[key][r] * keys[key], the block's sum first: one running sum over
// many thousand keys would lose digits.
template <class T, int kRows>
ANYFLASH_INLINE void add_to_rows(const float* tile, const T* const* keys, int count, int head_dim,
                                 float* dq) {
  const int64_t columns = round_up(head_dim, kLanes);
  for (int i = 0; i < head_dim; i += kLanes) {
    Float totals[kRows];
    for (int r = 0; r < kRows; ++r) totals[r] = Float{};
    for (int key = 0; key < count; ++key) {
      const Float y = load_some(keys[key] + i, head_dim - i);
      for (int r = 0; r < kRows; ++r) {
        totals[r] = multiply_add(broadcast(tile[key * kPanel + r]), y, totals[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      float* at = dq + r * columns + i;
      store(at, load(at) + totals[r]);
    }
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
    const float factor = finish_gradient_scores(p, sequence, panel, first, keys, tiles);
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

}  // namespace anyflash::cpu::ANYFLASH_ISA
