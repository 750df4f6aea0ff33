// Attention of a few rows against many keys: vectors along head_dim, straight from where the keys
// lie.
//
// Reading the keys is the work, so they are read once and in the order of memory, key by key with
// all key heads that are neighbours there: a walk that hardware prefetchers follow, helped by a
// software prefetch some rows ahead. Its products leave scores as tiles[key][lane], a lane for each
// row of each key head, and meet probabilities as such; in between lies forward.h's softmax.
#pragma once

#include "kernels/cpu/forward.h"

namespace anyflash::cpu::ANYFLASH_ISA {

// Measured, as keys_together() is.
constexpr int kDecodeBlock = 32;     // keys
constexpr int kAheadBytes = 8192;    // to prefetch ahead,
constexpr int kMaxAhead = 64;        // in so many keys at most
constexpr int kMaxKeysTogether = 4;  // whose values are added together
// Rows of a key head; with more, `forward` with its rows along the lanes is faster.
constexpr int kMaxDecodeRows = kLanes < 8 ? kLanes : 8;

// q in the form that meets keys as they lie in memory: bf16 pairs where one instruction multiplies
// them, else floats.
template <class T, bool kPairs>
struct DecodeProduct {
  static constexpr int kColumns = kLanes;
  using Query = float;
  ANYFLASH_INLINE Float multiply_add(const Query* q, const T* k, Float c) {
    return load(q) * load(k) + c;
  }
};

template <class T>
struct DecodeProduct<T, true> {
  static constexpr int kColumns = 2 * kLanes;
  using Query = T;
  ANYFLASH_INLINE Float multiply_add(const Query* q, const T* k, Float c) {
    return bf16_dot(load_words(q), load_words(k), c);
  }
};

// A block of keys or values: all key heads' columns of each row, and what to prefetch meanwhile.
template <class T>
struct BlockRows {
  // Of the first key head; behind the last key it is repeated, as far as anybody looks.
  const T* rows[kDecodeBlock + kMaxAhead + kLanes + 1];
  int count;  // keys
  int ahead;  // keys
  int64_t head_stride;

  __attribute__((always_inline)) const T* row(int key, int head) const {
    return rows[key] + head * head_stride;
  }
  __attribute__((always_inline)) const T* row_ahead(int key, int head) const {
    return row(key + ahead, head);
  }
};

template <class T>
ANYFLASH_INLINE void find_block(const AttentionParams& p, const Rows& x, const Sequence& sequence,
                                const Item& item, int head_dim, int64_t first,
                                BlockRows<T>& block) {
  const int64_t bytes = item.num_spaces * head_dim * static_cast<int64_t>(sizeof(T));
  block.head_stride = x.head_stride;
  block.count = static_cast<int>(smaller<int64_t>(kDecodeBlock, item.key_end - first));
  block.ahead = static_cast<int>(smaller<int64_t>(kMaxAhead, (kAheadBytes + bytes - 1) / bytes));
  const int wanted = block.count + block.ahead + kLanes + 1;
  const int found = static_cast<int>(smaller<int64_t>(wanted, item.key_end - first));
  // Without dropout a row space is a key head's.
  find_key_rows<T>(p, x, sequence, item.space, first, found, block.rows);
  for (int i = found; i < wanted; ++i) block.rows[i] = block.rows[found - 1];
}

// tiles[panel][key][lane] for a block of keys.
ANYFLASH_INLINE float* at_lane(float* tiles, int key, int lane) {
  return tiles + (lane / kPanel * kDecodeBlock + key) * kPanel + lane % kPanel;
}

// Scores of kRows rows of q per key head and all keys of a block. (Functions of their own have the
// registers for their loops.)
template <class T, class Product, int kRows>
static __attribute__((noinline)) void decode_scores(const typename Product::Query* q, int head_dim,
                                                    int heads, const BlockRows<T>& keys,
                                                    float* tiles) {
  constexpr int kTogether = kLanes / kRows;  // rows of keys whose sums are added up together
  const int64_t head_stride = keys.head_stride;
  const T* k = keys.rows[0];
  const T* ahead = keys.rows[keys.ahead];
  const typename Product::Query* own_q = q;
  float* to = tiles;
  int key = 0, head = 0;
  while (key < keys.count) {
    Float products[kLanes];
    float* scores[kTogether];
#pragma GCC unroll 16
    for (int x = 0; x < kTogether; ++x) {  // behind the last key it goes on; nobody reads that
      Float own[kRows];
      for (int r = 0; r < kRows; ++r) own[r] = Float{};
      for (int column = 0; column < head_dim; column += Product::kColumns) {
        __builtin_prefetch(ahead + column, 0, 3);
        for (int r = 0; r < kRows; ++r) {
          own[r] = Product::multiply_add(own_q + r * head_dim + column, k + column, own[r]);
        }
      }
      for (int r = 0; r < kRows; ++r) products[x * kRows + r] = own[r];
      scores[x] = to;
      k += head_stride;
      ahead += head_stride;
      own_q += kRows * head_dim;
      to += kRows;
      if (++head == heads) {
        head = 0;
        ++key;
        k = keys.rows[key];
        ahead = keys.rows[key + keys.ahead];
        own_q = q;
        to = tiles + key * kPanel;
      } else if (head % (kPanel / kRows) == 0) {
        to += (kDecodeBlock - 1) * kPanel;
      }
    }
    alignas(64) float reduced[kLanes];
    store(reduced, sums(products));
    for (int x = 0; x < kTogether; ++x) {
      memcpy(scores[x], reduced + x * kRows, sizeof(float) * kRows);
    }
  }
}

// Scores of a panel become probabilities, and its rows of `out` what is left of them beside a new
// largest score.
template <class Product>
static __attribute__((noinline)) void decode_softmax(const AttentionParams& p, const Panel& panel,
                                                     int64_t first_key, int keys, int columns,
                                                     float* tile, float* out) {
  alignas(64) float maxima[kPanel], scale[kPanel];
  find_maxima(tile, keys, panel.lanes.vectors, maxima);
  finish_scores(p, panel.lanes, first_key, keys, tile, maxima);
  BlockScratch block{};
  block.scores = tile;
  softmax<Product, false>(panel, block, keys, maxima, exponent_scale(p), scale);
  // Keys that a group of values lacks weigh nothing.
  const int weights = (keys + Product::kPerWord - 1) / Product::kPerWord;
  for (int key = weights; key < round_up(weights, kMaxKeysTogether); ++key) {
    memset(tile + key * kPanel, 0, sizeof(float) * kPanel);
  }
  for (int lane = 0; lane < panel.lanes.rows; ++lane) {
    if (scale[lane] == 1.0f) continue;
    float* row = out + lane * columns;
    for (int column = 0; column < columns; column += kLanes) {
      store(row + column, load(row + column) * scale[lane]);
    }
  }
}

// Keys whose values are added to `out` together, so that it is loaded and stored less often: a
// power of two, even where weights come in pairs.
template <bool kPairs, int kRows>
constexpr int keys_together() {
  return kPairs ? (kRows >= 4 ? kMaxKeysTogether : 2) : kRows > 1 ? 2 : 1;
}

// out[r] += weights[key][r] * rows[key] of kKeys keys.
template <class T, int kRows, int kKeys>
static __attribute__((noinline)) void add_values(const float* weights,
                                                 const T* const (&rows)[kKeys], const T* ahead,
                                                 int columns, float* out) {
  Float weight[kRows][kKeys];
  for (int r = 0; r < kRows; ++r) {
    for (int key = 0; key < kKeys; ++key) weight[r][key] = broadcast(weights[key * kPanel + r]);
  }
  for (int column = 0; column < columns; column += kLanes) {
    __builtin_prefetch(ahead + column, 0, 3);
    Float x[kKeys];
    for (int key = 0; key < kKeys; ++key) x[key] = load(rows[key] + column);
    for (int r = 0; r < kRows; ++r) {
      float* at = out + r * columns + column;
      Float total = load(at);
      for (int key = 0; key < kKeys; ++key) {
        total = multiply_add(weight[r][key], x[key], total);
      }
      store(at, total);
    }
  }
}

#if defined(__AVX512BF16__)
// The same with weights in pairs of keys.
template <int kRows, int kKeys>
static __attribute__((noinline)) void add_values(const Word* weights,
                                                 const Bf16* const (&rows)[kKeys],
                                                 const Bf16* ahead, int columns, float* out) {
  Words weight[kRows][kKeys / 2];
  for (int r = 0; r < kRows; ++r) {
    for (int pair = 0; pair < kKeys / 2; ++pair) {
      weight[r][pair] = broadcast(weights[pair * kPanel + r]);
    }
  }
  int column = 0;
  for (; column + 2 * kLanes <= columns; column += 2 * kLanes) {
    __builtin_prefetch(ahead + column, 0, 3);
    WordsPair x[kKeys / 2];
    for (int pair = 0; pair < kKeys / 2; ++pair) {
      x[pair] = zipped_twice(rows[2 * pair] + column, rows[2 * pair + 1] + column);
    }
    for (int r = 0; r < kRows; ++r) {
      float* at = out + r * columns + column;
      Float first = load(at), second = load(at + kLanes);
      for (int pair = 0; pair < kKeys / 2; ++pair) {
        first = bf16_dot(weight[r][pair], x[pair].first, first);
        second = bf16_dot(weight[r][pair], x[pair].second, second);
      }
      store(at, first);
      store(at + kLanes, second);
    }
  }
  for (; column < columns; column += kLanes) {
    for (int r = 0; r < kRows; ++r) {
      float* at = out + r * columns + column;
      Float total = load(at);
      for (int pair = 0; pair < kKeys / 2; ++pair) {
        total = bf16_dot(weight[r][pair],
                         zipped(rows[2 * pair] + column, rows[2 * pair + 1] + column), total);
      }
      store(at, total);
    }
  }
}
#endif

// out[head][r] += the probabilities of a block of keys * values, some keys at a time: memory is
// read as a stream, all but the last key's rows wait in `staged`, near enough, until that is met.
template <class T, bool kPairs, int kRows>
static __attribute__((noinline)) void decode_values(float* tiles, const BlockRows<T>& values,
                                                    int heads, int columns, T* staged,
                                                    const T* zeros, float* out) {
  constexpr int kKeys = keys_together<kPairs, kRows>();
  for (int key = 0; key < values.count; key += kKeys) {
    const int count = values.count - key < kKeys ? values.count - key : kKeys;
    for (int i = 0; i < count - 1; ++i) {
      for (int head = 0; head < heads; ++head) {
        const T* row = values.row(key + i, head);
        const T* ahead = values.row_ahead(key + i, head);
        T* to = staged + (i * heads + head) * columns;
        for (int column = 0; column < columns; column += kLanes) {
          __builtin_prefetch(ahead + column, 0, 3);
          memcpy(to + column, row + column, sizeof(T) * kLanes);
        }
      }
    }
    for (int head = 0; head < heads; ++head) {
      const T* rows[kKeys];
      for (int i = 0; i < kKeys; ++i) {
        rows[i] = i < count - 1 ? staged + (i * heads + head) * columns
                  : i < count   ? values.row(key + i, head)
                                : zeros;
      }
      const T* ahead = values.row_ahead(key + count - 1, head);
      float* own_out = out + head * kRows * columns;
      if constexpr (kPairs) {
        const float* weights = at_lane(tiles, key / 2, head * kRows);
        add_values<kRows, kKeys>(reinterpret_cast<const Word*>(weights), rows, ahead, columns,
                                 own_out);
      } else {
        add_values<T, kRows, kKeys>(at_lane(tiles, key, head * kRows), rows, ahead, columns,
                                    own_out);
      }
    }
  }
}

template <class T>
static bool can_decode(const ForwardPlan& plan) {
  const AttentionParams& p = *plan.params;
  return p.head_dim % kLanes == 0 && p.head_dim_v % kLanes == 0 && p.dropout_p == 0;
}

// Rows of a key head as they are computed.
constexpr int padded_rows(int64_t rows) {
  return rows <= 2 ? static_cast<int>(rows) : rows <= 4 ? 4 : 8;
}

template <class T>
static int64_t decode_scratch_bytes(const ForwardPlan& plan, int64_t num_spaces) {
  const AttentionParams& p = *plan.params;
  const int64_t lanes = num_spaces * kMaxDecodeRows;
  const int64_t panels = (lanes + kPanel - 1) / kPanel;
  return 4 * (lanes * (p.head_dim + p.head_dim_v) + panels * (kDecodeBlock + 3) * kPanel +
              (num_spaces * (kMaxKeysTogether - 1) + 1) * p.head_dim_v) +
         panels * static_cast<int64_t>(sizeof(Panel)) + 64 * 8;
}

// Lanes of a panel of decode: the padded rows of one key head after the other's.
static __attribute__((noinline)) void describe_decode_lanes(const ForwardPlan& plan,
                                                            const Item& item,
                                                            const Sequence& sequence,
                                                            int rows_per_head, int first_lane,
                                                            Lanes& lanes) {
  const AttentionParams& p = *plan.params;
  const int rest = static_cast<int>(item.num_spaces) * rows_per_head - first_lane;
  lanes.rows = rest < kPanel ? rest : kPanel;
  lanes.vectors = (lanes.rows + kLanes - 1) / kLanes;
  describe_keys(plan.rows, sequence.mask, 0, item.row_end, lanes);
  for (int i = 0; i < lanes.vectors * kLanes; ++i) {
    const int lane = first_lane + (i < lanes.rows ? i : lanes.rows - 1);
    const int64_t row = smaller<int64_t>(lane % rows_per_head, item.row_end - 1);
    describe_lane(p, sequence, plan.rows.query(row),
                  plan.rows.head(item.space + lane / rows_per_head, row), i, lanes);
  }
}

template <class T>
static __attribute__((noinline)) void write_decoded(const ForwardPlan& plan, const Item& item,
                                                    const Sequence& sequence, const Panel* panels,
                                                    int rows_per_head, const float* out) {
  const AttentionParams& p = *plan.params;
  const int columns = static_cast<int>(p.head_dim_v);
  float* partial = item.partial;
  for (int h = 0; h < item.num_spaces; ++h) {
    for (int r = 0; r < item.row_end; ++r) {
      const int lane = h * rows_per_head + r;
      const Panel& panel = panels[lane / kPanel];
      const float* row = out + lane * columns;
      const Float max = broadcast(panel.max[lane % kPanel]);
      const Float growth = growth_to_max(p, max);
      const Float total = broadcast(panel.sum[lane % kPanel]) * growth;
      const Float largest = max * logit_scale(p);
      if (partial != nullptr) {
        for (int column = 0; column < columns; column += kLanes) {
          store(partial + column, load(row + column) * growth);
        }
        partial[columns] = largest[0];
        partial[columns + 1] = total[0];
        partial += partial_row_floats(p);
        continue;
      }
      const int64_t query = plan.rows.query(r), head = plan.rows.head(item.space + h, r);
      const Float sink = broadcast(p.sinks ? p.sinks[head] : -kInfinity);
      const Statistics end = finish_softmax(p, largest, total, sink);
      const Float factor = growth * end.factor;
      T* to = query_row<T>(p, p.out, sequence, query, head);
      for (int column = 0; column < columns; column += kLanes) {
        store(to + column, load(row + column) * factor);
      }
      *statistic(p, p.lse, sequence, query, head) = end.lse[0];
    }
  }
}

template <class T, bool kPairs, int kRows>
ANYFLASH_INLINE void decode_rows(const ForwardPlan& plan, const Item& item, char* memory) {
  using Product = DecodeProduct<T, kPairs>;
  using Query = typename Product::Query;
  using Probabilities = typename ProductOf<T>::Type;
  const AttentionParams& p = *plan.params;
  const Sequence sequence(p, item.sequence);
  const int heads = static_cast<int>(item.num_spaces);
  const int head_dim = static_cast<int>(p.head_dim), columns = static_cast<int>(p.head_dim_v);
  const int lanes = heads * kRows, num_panels = (lanes + kPanel - 1) / kPanel;

  Scratch scratch{memory};
  Query* q = scratch.take<Query>(lanes * head_dim);
  float* out = scratch.take<float>(lanes * columns);
  float* tiles = scratch.take<float>(num_panels * kDecodeBlock * kPanel);
  T* staged = scratch.take<T>((kMaxKeysTogether - 1) * heads * columns);
  T* zeros = scratch.take<T>(columns);
  memset(zeros, 0, sizeof(T) * static_cast<size_t>(columns));
  Panel* panels = scratch.take<Panel>(num_panels);
  if (item.row_end < kRows) memset(q, 0, sizeof(Query) * static_cast<size_t>(lanes) * head_dim);
  memset(out, 0, sizeof(float) * static_cast<size_t>(lanes) * columns);
  if (lanes % kLanes != 0) {  // lanes without a row are computed as well
    memset(tiles, 0, sizeof(float) * static_cast<size_t>(num_panels) * kDecodeBlock * kPanel);
  }
  for (int i = 0; i < num_panels; ++i) {
    describe_decode_lanes(plan, item, sequence, kRows, i * kPanel, panels[i].lanes);
    panels[i].max = scratch.take<float>(kPanel);
    panels[i].sum = scratch.take<float>(kPanel);
    for (int lane = 0; lane < kPanel; ++lane) {
      panels[i].max[lane] = -kInfinity;
      panels[i].sum[lane] = 0;
    }
  }
  for (int h = 0; h < heads; ++h) {
    for (int r = 0; r < item.row_end; ++r) {
      const T* from = query_row<const T>(p, p.q, sequence, plan.rows.query(r),
                                         plan.rows.head(item.space + h, r));
      Query* to = q + (h * kRows + r) * head_dim;
      if constexpr (kPairs) {
        memcpy(to, from, sizeof(T) * static_cast<size_t>(head_dim));
      } else {
        widen_row(from, head_dim, to);
      }
    }
  }

  BlockRows<T> block;
  for (int64_t first = item.key_begin; first < item.key_end; first += kDecodeBlock) {
    find_block<T>(p, p.k, sequence, item, head_dim, first, block);
    decode_scores<T, Product, kRows>(q, head_dim, heads, block, tiles);
    for (int i = 0; i < num_panels; ++i) {
      decode_softmax<Probabilities>(p, panels[i], first, block.count, columns,
                                    at_lane(tiles, 0, i * kPanel), out + i * kPanel * columns);
    }
    find_block<T>(p, p.v, sequence, item, columns, first, block);
    decode_values<T, Probabilities::kPerWord == 2, kRows>(tiles, block, heads, columns, staged,
                                                          zeros, out);
  }
  write_decoded<T>(plan, item, sequence, panels, kRows, out);
}

template <class T, bool kPairs>
ANYFLASH_INLINE void decode_any_rows(const ForwardPlan& plan, const Item& item, char* memory) {
  switch (padded_rows(item.row_end)) {
    case 1:
      return decode_rows<T, kPairs, 1>(plan, item, memory);
    case 2:
      return decode_rows<T, kPairs, 2>(plan, item, memory);
    case 4:
      return decode_rows<T, kPairs, 4>(plan, item, memory);
    default:
      return decode_rows<T, kPairs, kMaxDecodeRows>(plan, item, memory);
  }
}

template <class T>
static void decode_item(const ForwardPlan& plan, const Item& item, char* memory) {
  if constexpr (ProductOf<T>::Type::kPerWord == 2) {
    if (plan.params->head_dim % (2 * kLanes) == 0) {
      return decode_any_rows<T, true>(plan, item, memory);
    }
  }
  decode_any_rows<T, false>(plan, item, memory);
}

}  // namespace anyflash::cpu::ANYFLASH_ISA
