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

#include "kernels/cpu/backward_few_rows.h"

namespace anyflash::cpu::ANYFLASH_ISA {

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
      {chunk.k_over + offset / kPerWord * chunk.over.step, chunk.over.row, chunk.over.step,
       reinterpret_cast<const Word*>(ds_pairs), kPanel, dq, kPanel, head_dim, key_steps});
}

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
  const int block_keys = balanced_block<Product>(item.key_end - item.key_begin);
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

template <class Product, class T>
static __attribute__((noinline)) void backward_item_with(const BackwardPlan& plan,
                                                         const BackwardItem& item, char* memory) {
  const AttentionParams& p = *plan.params;
  const Sequence sequence(p, item.sequence);
  const int64_t kv_head = item.space * plan.rows.heads / (p.heads / p.heads_k);
  const int head_dim = static_cast<int>(p.head_dim), head_dim_v = static_cast<int>(p.head_dim_v);
  const int64_t columns = round_up(head_dim, kLanes), columns_v = round_up(head_dim_v, kLanes);
  const int keys = static_cast<int>(item.key_end - item.key_begin);

  [[maybe_unused]] const typename Product::Setup setup;

  Scratch scratch{memory};
  KeyChunk chunk;
  chunk.k = scratch.take<Word>(keys * words_per_row<Product>(head_dim));
  chunk.v = scratch.take<Word>(keys * words_per_row<Product>(head_dim_v));
  chunk.over = over_keys<Product>(head_dim, round_up(keys, 2 * kLanes));
  chunk.k_over = Product::kPerWord == 1
                     ? chunk.k
                     : scratch.take<Word>(round_up(keys, 2 * kLanes) / 2 * head_dim);
  chunk.dk = scratch.take<float>(keys * columns);
  chunk.dv = scratch.take<float>(keys * columns_v);
  Word* staging = scratch.take<Word>(kPanel * larger(columns, columns_v));
  const GradientTiles tiles = take_tiles<Product>(p, scratch);
  GradientPanel panel = take_panel<Product>(p, scratch);

  const int64_t num_rows = sequence.mask.seqlen_q * plan.rows.heads;
  const int64_t num_panels = (num_rows + kPanel - 1) / kPanel;
  // Theirs are sums of another order, which far rows may not see.
  const bool few_rows = num_rows <= kFewRows && plan.reference.data == nullptr;
  const T *k_rows[kMaxChunk], *v_rows[kMaxChunk];
  find_key_rows<T>(p, p.k, sequence, kv_head, item.key_begin, keys, k_rows);
  find_key_rows<T>(p, p.v, sequence, kv_head, item.key_begin, keys, v_rows);
  if (!few_rows) {
    words_along_rows<Product>(k_rows, keys, head_dim, chunk.k);
    if (Product::kPerWord > 1) {
      keys_as_a<Product>(k_rows, keys, head_dim, chunk.over, chunk.k_over);
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

// The scores of far rows are to be those that far_rows() saw, to the last bit.
template <class T>
static void backward_item(const BackwardPlan& plan, const BackwardItem& item, char* memory) {
  using Product = typename ProductOf<T>::Type;
  if (plan.reference.data == nullptr) {
    backward_item_with<Product, T>(plan, item, memory);
  } else {
    backward_item_with<typename Product::InRegisters, T>(plan, item, memory);
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

}  // namespace anyflash::cpu::ANYFLASH_ISA
