// Attention forward, transposed: S^T = K Q^T, P^T = exp2(S^T - max), O^T += V^T P^T.
//
// Rows (queries) lie along the lanes, so keys and values are only ever broadcast, the softmax never
// looks across lanes, and a block of converted keys serves all panels of an item.
#pragma once

#include "kernels/cpu/scores.h"

namespace anyflash::cpu::ANYFLASH_ISA {

constexpr int kItemRows = kLanes == 16 ? 256 : 128;  // a block's conversion serves them all
constexpr int kPanels = kItemRows / kPanel;
// Keys per vector of rows, where one panel reads all keys: whole tiles. A block for one vector
// alone would be over before the next block's rows are there, so it takes those for two.
template <class Product>
constexpr int kSmallBlock = Product::kTiles ? 32 : 24;

// The online softmax of a panel, and its output so far.
struct Panel {
  Lanes lanes;
  Word* q;     // [word of head_dim][lane]
  float* out;  // [column of v][lane]
  float* max;  // of the scores, -inf before the first visible key
  float* sum;
};

// What a thread needs for one block of keys.
struct BlockScratch {
  Word* keys;     // words along rows
  Word* values;   // as the A of a product over keys
  OverKeys over;  // where their columns and keys lie
  float* scores;  // [key][lane]; probabilities overwrite them
  Word* kept;     // [key][lane], dropout alone
};

struct Statistics {
  Float lse;
  Float factor;  // of the weighted sums
};

// exp(x - reference) of logits that are at most `reference`, which is not -inf.
ANYFLASH_INLINE Float weight_beside(Float x, Float reference) {
  return exp2<6>((x - reference) * kLog2e);
}

// The largest logit of lanes, or 0 where there is none: exp(-inf - 0) is 0.
ANYFLASH_INLINE Float finite_reference(Float max) {
  return select(max == broadcast(-kInfinity), Float{}, max);
}

// The end of a softmax: the largest logit and `sum` over keys, `sink` or -inf.
ANYFLASH_INLINE Statistics finish_softmax(const AttentionParams& p, Float max, Float sum,
                                          Float sink) {
  const Float reference = finite_reference(maximum(sink, max));
  const Float shrink = weight_beside(max, reference);
  const Float total = sum * shrink + weight_beside(sink, reference);
  const Int unseen = sum == Float{};
  return {
      select(unseen, broadcast(kInfinity), multiply_add(log2(total), broadcast(kLn2), reference)),
      select(unseen, Float{}, shrink / (total * static_cast<float>(1.0 - p.dropout_p)))};
}

// Scores become probabilities in place, for bf16 products as pairs of keys. `scale` receives what
// the sums so far have to be multiplied with.
template <class Product, bool kDropout>
ANYFLASH_INLINE void softmax(const Panel& panel, const BlockScratch& block, int keys,
                             const float* maxima, float scale_of_exponents, float* scale) {
  for (int lane = 0; lane < panel.lanes.vectors * kLanes; lane += kLanes) {
    const Float before = load(panel.max + lane);
    const Float max = maximum(before, load(maxima + lane));
    const Exponents exponents = Exponents::of(max, scale_of_exponents);
    // From the reference before to the one now, each with its own rounding.
    const Float rescale =
        exp2<6>(exponents.at(before) - exponents.rounding(finite_reference(before)));
    Float sum{};  // of the block, first: as one running sum over all keys it would lose digits
    store(panel.max + lane, max);
    store(scale + lane, rescale);
    float* tile = block.scores + lane;
    const Word* kept = block.kept + lane;
    const auto probability = [&](int key) __attribute__((always_inline)) {
      const Float x = load(tile + key * kPanel);
      return exp2<Product::kExp2Degree>(exponents.at(x));
    };
    const auto dropped = [&](Float x, int key) __attribute__((always_inline)) {
      return kDropout ? (Float)((Words)x & load_words(kept + key * kPanel)) : x;
    };
    if constexpr (Product::kPerWord == 1) {
      for (int key = 0; key < keys; ++key) {
        const Float x = probability(key);
        sum = sum + x;
        store(tile + key * kPanel, dropped(x, key));
      }
    } else {
      int key = 0;
      for (; key + 1 < keys; key += 2) {
        const Float x = probability(key), y = probability(key + 1);
        sum = sum + (x + y);
        store_words(tile + key / 2 * kPanel, bf16_pairs(dropped(x, key), dropped(y, key + 1)));
      }
      if (key < keys) {
        const Float x = probability(key);
        sum = sum + x;
        store_words(tile + key / 2 * kPanel, bf16_pairs(dropped(x, key), Float{}));
      }
    }
    store(panel.sum + lane, multiply_add(load(panel.sum + lane), rescale, sum));
  }
}

// Keys [first, first + keys) of the sequence, which begin at `block`. `ahead`: rows of k and of v.
template <class Product>
ANYFLASH_INLINE void attend(const AttentionParams& p, const Sequence& sequence, const Panel& panel,
                            const BlockScratch& block, int64_t first, int keys,
                            const Prefetch (&ahead)[2]) {
  const int words = words_per_row<Product>(p.head_dim), columns = static_cast<int>(p.head_dim_v);
  alignas(64) float maxima[kPanel], scale[kPanel];
  multiply<Product, Start::zero, true>(
      panel.lanes.vectors,
      {block.keys, words, 1, panel.q, kPanel, block.scores, kPanel, keys, words, ahead[0]}, nullptr,
      maxima);
  finish_scores(p, panel.lanes, first, keys, block.scores, maxima);
  if (p.dropout_p > 0) {
    dropout_mask(p, sequence, panel.lanes, first, keys, block.kept);
    softmax<Product, true>(panel, block, keys, maxima, exponent_scale(p), scale);
  } else {
    softmax<Product, false>(panel, block, keys, maxima, exponent_scale(p), scale);
  }
  const int steps = (keys + Product::kPerWord - 1) / Product::kPerWord;
  multiply<Product, Start::scaled, false>(
      panel.lanes.vectors,
      {block.values, block.over.row, block.over.step, reinterpret_cast<Word*>(block.scores), kPanel,
       panel.out, kPanel, columns, steps, ahead[1]},
      scale);
}

template <class T>
ANYFLASH_INLINE Prefetch prefetch_rows(const void* const* rows, int count, int columns) {
  const int lines = (columns * static_cast<int>(sizeof(T)) + 63) / 64;
  return {rows, lines, 0, count * lines};
}

// A panel's queries, transposed.
template <class Product, class T>
ANYFLASH_INLINE void load_queries(const AttentionParams& p, const RowSpace& rows, const Rows& x,
                                  const Sequence& sequence, int64_t space, int64_t row_begin,
                                  int count, int head_dim, Word* staging, Word* out) {
  const int words = words_per_row<Product>(head_dim);
  const T* row[kPanel];
  for (int r = 0; r < count; ++r) {
    row[r] = query_row<const T>(p, x, sequence, rows.query(row_begin + r),
                                rows.head(space, row_begin + r));
  }
  if (sizeof(T) * Product::kPerWord == sizeof(Word) && head_dim % Product::kPerWord == 0) {
    const auto words_of = [&](int r) __attribute__((always_inline)) {
      return reinterpret_cast<const Word*>(row[r]);  // they are words as they lie there
    };
    transpose_rows(words_of, count, words, out, kPanel);
  } else {
    words_along_rows<Product>(row, count, head_dim, staging);
    transpose(staging, words, count, words, out, kPanel);
  }
}

// out[column][lane] as rows; row r begins at staging + r * round_up(columns, kLanes).
ANYFLASH_INLINE void as_rows(const float* out, int columns, int vectors, float* staging) {
  transpose(reinterpret_cast<const Word*>(out), kPanel, columns, vectors * kLanes,
            reinterpret_cast<Word*>(staging), round_up(columns, kLanes));
}

// What brings a lane's sums to the true largest score: their reference is a product, rounded, and
// far from 0 that is more than a sink or another part of the keys may overlook.
ANYFLASH_INLINE Float growth_to_max(const AttentionParams& p, Float max) {
  const Float rounding = Exponents::of(max, exponent_scale(p)).rounding(finite_reference(max));
  const Int matters = maximum(rounding, -rounding) > broadcast(0x1p-12f);
  return select(matters, exp2<6>(-rounding), broadcast(1.0f));
}

static __attribute__((noinline)) void refer_to_max(const AttentionParams& p, const Panel& panel) {
  for (int lane = 0; lane < panel.lanes.vectors * kLanes; lane += kLanes) {
    const Float growth = growth_to_max(p, load(panel.max + lane));
    if (largest_lane(maximum(growth - 1.0f, 1.0f - growth)) == 0) continue;
    store(panel.sum + lane, load(panel.sum + lane) * growth);
    for (int column = 0; column < p.head_dim_v; ++column) {
      float* at = panel.out + column * kPanel + lane;
      store(at, load(at) * growth);
    }
  }
}

template <class T>
ANYFLASH_INLINE void write_panel(const ForwardPlan& plan, const Item& item,
                                 const Sequence& sequence, const Panel& panel, int64_t row_begin,
                                 float* staging) {
  const AttentionParams& p = *plan.params;
  const int columns = static_cast<int>(p.head_dim_v);
  const int64_t stride = round_up(columns, kLanes);
  refer_to_max(p, panel);
  alignas(64) float lse[kPanel], factor[kPanel];
  if (item.partial == nullptr) {
    alignas(64) float sink[kPanel];
    for (int r = 0; r < kPanel; ++r) {
      sink[r] = p.sinks ? p.sinks[plan.rows.head(item.space, row_begin + r)] : -kInfinity;
    }
    for (int lane = 0; lane < panel.lanes.vectors * kLanes; lane += kLanes) {
      const Statistics end = finish_softmax(p, load(panel.max + lane) * logit_scale(p),
                                            load(panel.sum + lane), load(sink + lane));
      store(lse + lane, end.lse);
      store(factor + lane, end.factor);
    }
  }
  as_rows(panel.out, columns, panel.lanes.vectors, staging);
  for (int r = 0; r < panel.lanes.rows; ++r) {
    const float* row = staging + r * stride;
    if (item.partial != nullptr) {
      float* out = item.partial + (row_begin - item.row_begin + r) * partial_row_floats(p);
      memcpy(out, row, static_cast<size_t>(columns) * sizeof(float));
      out[columns] = panel.max[r] * logit_scale(p);
      out[columns + 1] = panel.sum[r];
      continue;
    }
    const int64_t query = plan.rows.query(row_begin + r);
    const int64_t head = plan.rows.head(item.space, row_begin + r);
    narrow_scaled(row, columns, factor[r], query_row<T>(p, p.out, sequence, query, head));
    *statistic(p, p.lse, sequence, query, head) = lse[r];
  }
}

template <class T>
static void forward_item(const ForwardPlan& plan, const Item& item, char* memory) {
  using Product = typename ProductOf<T>::Type;
  const AttentionParams& p = *plan.params;
  const Sequence sequence(p, item.sequence);
  const int64_t kv_head = item.space * plan.rows.heads / (p.heads / p.heads_k);
  const int head_dim = static_cast<int>(p.head_dim), columns = static_cast<int>(p.head_dim_v);
  const int words = words_per_row<Product>(head_dim);
  [[maybe_unused]] const typename Product::Setup setup;

  Scratch scratch{memory};
  BlockScratch block{};
  block.keys = scratch.take<Word>(kBlock * words);
  block.values = scratch.take<Word>(kBlock / Product::kPerWord * columns);
  block.over = over_keys<Product>(columns, kBlock);
  block.scores = scratch.take<float>(kBlock * kPanel);
  block.kept = scratch.take<Word>(p.dropout_p > 0 ? kBlock * kPanel : 0);
  Word* staging = scratch.take<Word>(kPanel * round_up(larger(head_dim, columns), kLanes));

  Panel panels[kPanels];
  int num_panels = 0;
  TileRange<int64_t> seen{item.key_end, item.key_begin};
  for (int64_t row = item.row_begin; row < item.row_end; row += kPanel) {
    Panel& panel = panels[num_panels++];
    describe_lanes(p, plan.rows, sequence, item.space, row, item.row_end, panel.lanes);
    panel.q = scratch.take<Word>(words * kPanel);
    panel.out = scratch.take<float>(columns * kPanel);
    panel.max = scratch.take<float>(kPanel);
    panel.sum = scratch.take<float>(kPanel);
    load_queries<Product, T>(p, plan.rows, p.q, sequence, item.space, row, panel.lanes.rows,
                             head_dim, staging, panel.q);
    memset(panel.out, 0, sizeof(float) * static_cast<size_t>(columns) * kPanel);
    for (int r = 0; r < kPanel; ++r) {
      panel.max[r] = -kInfinity;
      panel.sum[r] = 0;
    }
    seen.begin = smaller(seen.begin, panel.lanes.some.begin);
    seen.end = larger(seen.end, panel.lanes.some.end);
  }
  seen.begin = larger(seen.begin, item.key_begin);
  seen.end = smaller(seen.end, item.key_end);

  // With few rows, reading the keys is the work: in small blocks, the next is on its way earlier.
  const int block_keys = num_panels == 1 ? kSmallBlock<Product> * larger(2, panels[0].lanes.vectors)
                                         : balanced_block<Product>(seen.end - seen.begin);
  for (int64_t first = seen.begin; first < seen.end; first += block_keys) {
    const int count = static_cast<int>(smaller<int64_t>(block_keys, seen.end - first));
    const T* rows[kBlock];
    find_key_rows<T>(p, p.k, sequence, kv_head, first, count, rows);
    words_along_rows<Product>(rows, count, head_dim, block.keys);
    find_key_rows<T>(p, p.v, sequence, kv_head, first, count, rows);
    keys_as_a<Product>(rows, count, columns, block.over, block.values);
    // The next block's rows, some during each panel.
    const void* next_rows[2][kBlock];
    const int64_t next = first + count;
    const auto next_count =
        static_cast<int>(larger<int64_t>(0, smaller<int64_t>(block_keys, seen.end - next)));
    find_key_rows<T>(p, p.k, sequence, kv_head, next, next_count, next_rows[0]);
    find_key_rows<T>(p, p.v, sequence, kv_head, next, next_count, next_rows[1]);
    const Prefetch ahead[2] = {prefetch_rows<T>(next_rows[0], next_count, head_dim),
                               prefetch_rows<T>(next_rows[1], next_count, columns)};
    for (int i = 0; i < num_panels; ++i) {
      // Keys outside of what the panel sees are left out; zipped values begin at even keys.
      const TileRange<int64_t>& some = panels[i].lanes.some;
      const int64_t skipped = larger<int64_t>(0, some.begin - first) & -Product::kPerWord;
      const int64_t end = smaller<int64_t>(count, some.end - first);
      if (skipped >= end) continue;
      BlockScratch visible = block;
      visible.keys += skipped * words;
      visible.values += skipped / Product::kPerWord * block.over.step;
      attend<Product>(p, sequence, panels[i], visible, first + skipped,
                      static_cast<int>(end - skipped),
                      {ahead[0].part(i, num_panels), ahead[1].part(i, num_panels)});
    }
  }
  for (int i = 0; i < num_panels; ++i) {
    write_panel<T>(plan, item, sequence, panels[i], item.row_begin + i * kPanel,
                   reinterpret_cast<float*>(staging));
  }
}

template <class T>
static int64_t forward_scratch_bytes(const ForwardPlan& plan) {
  using Product = typename ProductOf<T>::Type;
  const AttentionParams& p = *plan.params;
  const int64_t words = words_per_row<Product>(p.head_dim);
  const int64_t block = words + p.head_dim_v + (p.dropout_p > 0 ? 2 : 1) * kPanel;
  const int64_t panel = words + p.head_dim_v + 2;
  const int64_t staging = round_up(larger(p.head_dim, p.head_dim_v), kLanes);
  const int64_t alignment = 64 * (8 + 4 * kPanels);
  return 4 * (kBlock * block + kPanels * kPanel * panel + kPanel * staging) + alignment;
}

// Rows whose keys were split over items.
template <class T>
static void combine_parts(const ForwardPlan& plan, const Combination& combination) {
  const AttentionParams& p = *plan.params;
  const Item& item = combination.item;
  const Sequence sequence(p, item.sequence);
  const int columns = static_cast<int>(p.head_dim_v);
  const float* part = item.partial;
  for (int64_t space = item.space; space < item.space + item.num_spaces; ++space) {
    for (int64_t row = item.row_begin; row < item.row_end; ++row, part += partial_row_floats(p)) {
      const int64_t query = plan.rows.query(row), head = plan.rows.head(space, row);
      Float max = broadcast(-kInfinity);
      for (int64_t s = 0; s < combination.splits; ++s) {
        max = maximum(max, broadcast(part[s * combination.split_stride + columns]));
      }
      const Float reference = finite_reference(max);
      const auto weight = [&](int64_t s) __attribute__((always_inline)) {
        return weight_beside(broadcast(part[s * combination.split_stride + columns]), reference);
      };
      Float sum{};
      for (int64_t s = 0; s < combination.splits; ++s) {
        sum = sum + weight(s) * part[s * combination.split_stride + columns + 1];
      }
      const Float sink = broadcast(p.sinks ? p.sinks[head] : -kInfinity);
      const Statistics end = finish_softmax(p, max, sum, sink);
      T* out = query_row<T>(p, p.out, sequence, query, head);
      for (int column = 0; column < columns; column += kLanes) {
        Float total{};
        for (int64_t s = 0; s < combination.splits; ++s) {
          const float* from = part + s * combination.split_stride + column;
          total = multiply_add(weight(s), load_some(from, columns - column), total);
        }
        store_some(out + column, total * end.factor, columns - column);
      }
      *statistic(p, p.lse, sequence, query, head) = end.lse[0];
    }
  }
}

}  // namespace anyflash::cpu::ANYFLASH_ISA
