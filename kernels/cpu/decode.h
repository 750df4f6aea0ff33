// Attention of a few rows against many keys: vectors along head_dim, straight from where the keys
// lie.
//
// Reading the keys is the work, so they are read once, in the order of memory: an item walks a
// range of keys for all key heads whose rows are neighbours there, in blocks of kDecodeBlock keys,
// and while one head's rows are used, the next head's (or the next block's) are prefetched row for
// row.
#pragma once

#include "kernels/cpu/forward.h"

namespace anyflash::cpu::ANYFLASH_ISA {

constexpr int kDecodeBlock = 16;  // keys
static_assert(kDecodeBlock % kLanes == 0);

// Rows from which on `forward`, with its rows along the lanes, is faster (measured).
template <class T>
constexpr int64_t decode_rows() {
  return ProductOf<T>::Type::kPerWord == 2 ? 10 : 16;
}

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

// The rows of one block of keys for one key head, and those to prefetch meanwhile (null: none).
template <class T>
struct BlockRows {
  const T* const* rows;
  int64_t head_offset;
  const T* const* next;
  int64_t next_offset;
};

// scores[r * kDecodeBlock + key] of kRows rows of q and all keys of a block, kKeys at a time; keys
// behind the last repeat it.
template <class T, class Product, int kRows, int kKeys = kLanes / kRows>
ANYFLASH_INLINE void decode_scores(const typename Product::Query* q, int head_dim,
                                   const BlockRows<T>& keys, int count, float* scores) {
  static_assert(kRows * kKeys <= kLanes);  // sums, added up together
  for (int key = 0; key < count; key += kKeys) {
    Float products[kLanes];
    for (int i = 0; i < kLanes; ++i) products[i] = Float{};
    for (int column = 0; column < head_dim; column += Product::kColumns) {
#pragma GCC unroll 16
      for (int x = 0; x < kKeys; ++x) {
        if (keys.next) __builtin_prefetch(keys.next[key + x] + keys.next_offset + column, 0, 2);
        const T* k = keys.rows[key + x] + keys.head_offset + column;
        for (int r = 0; r < kRows; ++r) {
          products[r * kKeys + x] =
              Product::multiply_add(q + r * head_dim + column, k, products[r * kKeys + x]);
        }
      }
    }
    alignas(64) float reduced[kLanes];
    store(reduced, sums(products));
    for (int r = 0; r < kRows; ++r) {
      memcpy(scores + r * kDecodeBlock + key, reduced + r * kKeys, sizeof(float) * kKeys);
    }
  }
}

// out[r] = out[r] * scale[r] + sum over keys of p[r][key] * v[key], columns [column, + kVectors
// vectors).
template <class T, int kRows, int kVectors>
ANYFLASH_INLINE void decode_values(const float* p, const BlockRows<T>& values, int count,
                                   int column, float* out, int64_t out_row, const float* scale) {
  Float total[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      total[r][v] = load(out + r * out_row + column + v * kLanes) * scale[r];
    }
  }
  for (int key = 0; key < count; ++key) {
    if (values.next) {
      prefetch_row(values.next[key] + values.next_offset + column, kVectors * kLanes);
    }
    const T* row = values.rows[key] + values.head_offset + column;
    Float x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load(row + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Float weight = broadcast(p[r * kDecodeBlock + key]);
      for (int v = 0; v < kVectors; ++v) total[r][v] = multiply_add(weight, x[v], total[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      store(out + r * out_row + column + v * kLanes, total[r][v]);
    }
  }
}

#if defined(__AVX512BF16__)
// The same with two keys per product. An odd last key meets a weight of 0: there is a row behind
// the last key (find_rows repeats it) and its weight is exp2(-inf).
template <int kRows, int kVectors>
ANYFLASH_INLINE void decode_value_pairs(const float* p, const BlockRows<Bf16>& values, int count,
                                        int column, float* out, int64_t out_row,
                                        const float* scale) {
  Float total[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      total[r][v] = load(out + r * out_row + column + v * kLanes) * scale[r];
    }
  }
  Word weights[kRows][kDecodeBlock];
  for (int r = 0; r < kRows; ++r) {
    const Float even = load(p + r * kDecodeBlock);
    // Lane i and its neighbour as a pair; the even lanes are read.
    const Float odd = (Float)__builtin_shufflevector((Words)even, (Words)even, 1, 1, 3, 3, 5, 5, 7,
                                                     7, 9, 9, 11, 11, 13, 13, 15, 15);
    store_words(weights[r], bf16_pairs(even, odd));
  }
  for (int key = 0; key < count; key += 2) {
    if (values.next) {
      for (int i = key; i < key + 2; ++i) {
        prefetch_row(values.next[i] + values.next_offset + column, kVectors * kLanes);
      }
    }
    const Bf16* row = values.rows[key] + values.head_offset + column;
    const Bf16* next_row = values.rows[key + 1] + values.head_offset + column;
    Words x[kVectors];
    for (int v = 0; v < kVectors; v += 2) {
      const WordsPair both = zipped_twice(row + v * kLanes, next_row + v * kLanes);
      x[v] = both.first;
      x[v + 1] = both.second;
    }
    for (int r = 0; r < kRows; ++r) {
      const Words weight = broadcast(weights[r][key]);
      for (int v = 0; v < kVectors; ++v) total[r][v] = bf16_dot(weight, x[v], total[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      store(out + r * out_row + column + v * kLanes, total[r][v]);
    }
  }
}
#endif

template <class T, int kRows>
ANYFLASH_INLINE void decode_all_values(const float* p, const BlockRows<T>& values, int count,
                                       int columns, float* out, const float* scale) {
  int column = 0;
#if defined(__AVX512BF16__)
  static_assert(kMaxVectors % 2 == 0 && kDecodeBlock == kLanes);
  for (; column + kMaxVectors * kLanes <= columns; column += kMaxVectors * kLanes) {
    decode_value_pairs<kRows, kMaxVectors>(p, values, count, column, out, columns, scale);
  }
#endif
  for (; column + kMaxVectors * kLanes <= columns; column += kMaxVectors * kLanes) {
    decode_values<T, kRows, kMaxVectors>(p, values, count, column, out, columns, scale);
  }
  for (; column < columns; column += kLanes) {
    decode_values<T, kRows, 1>(p, values, count, column, out, columns, scale);
  }
}

template <int kCount>
struct RowCount {
  static constexpr int value = kCount;
};

// Rows in steps of 4, 2 and 1; three rows are a step of 4.
template <class Step>
ANYFLASH_INLINE void for_row_groups(int rows, Step step) {
  for (int r = 0; r < rows;) {
    const int left = rows - r;
    if (left >= 3) {
      step(r, RowCount<4>{});
      r += 4;
    } else if (left == 2) {
      step(r, RowCount<2>{});
      r += 2;
    } else {
      step(r, RowCount<1>{});
      r += 1;
    }
  }
}

// The online softmax of the rows of one key head.
struct DecodeRows {
  float* out;    // [row][column of v]
  float* sum;    // [row][kLanes]: partial sums, one per lane
  float* max;    // [row], of the scores
  float* scale;  // [row], for the block at hand
};

// Scores of one row and block become probabilities.
ANYFLASH_INLINE void decode_softmax(const AttentionParams& p, const IntervalMask<int64_t>& mask,
                                    int64_t query, float slope, int64_t first, int keys, int row,
                                    const DecodeRows& rows, float* scores) {
  const bool purely_causal = p.window_left < 0 && p.window_right == 0;
  const bool scaled = only_scaled(p);
  const Scales scales = Scales::of(p);
  const auto begin =
      static_cast<int32_t>(smaller<int64_t>(kDecodeBlock, mask.kv_begin(query) - first));
  const auto end =
      static_cast<int32_t>(smaller<int64_t>(keys, larger<int64_t>(0, mask.kv_end(query) - first)));
  const auto first_distance =
      static_cast<int32_t>(purely_causal ? first : first - query - mask.shift());
  Int lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;

  Float logits[kDecodeBlock / kLanes];
  Float largest = broadcast(rows.max[row]);
  for (int i = 0; i < kDecodeBlock / kLanes; ++i, lane = lane + kLanes) {
    Float x = load(scores + i * kLanes);
    if (p.softcap > 0) {
      x = tanh(x * scales.argument) * scales.cap;
    } else if (!scaled) {
      x = x * scales.logit;
    }
    if (p.alibi_slopes) {
      const Int away = lane + first_distance;
      const Int distance = purely_causal ? away : (away < 0 ? away : -away);
      x = multiply_add(broadcast(slope), __builtin_convertvector(distance, Float), x);
    }
    x = select((lane >= begin) & (lane < end), x, broadcast(-kInfinity));
    logits[i] = x;
    largest = maximum(largest, x);
  }
  const float max = largest_lane(largest);
  const Float reference = finite_reference(broadcast(max));
  const float factor = exponent_scale(p);
  const Float scale = exp2<6>((broadcast(rows.max[row]) - reference) * factor);
  Float sum = load(rows.sum + row * kLanes) * scale;
  for (int i = 0; i < kDecodeBlock / kLanes; ++i) {
    const Float x = exp2<6>((logits[i] - reference) * factor);
    sum = sum + x;
    store(scores + i * kLanes, x);
  }
  store(rows.sum + row * kLanes, sum);
  rows.max[row] = max;
  rows.scale[row] = scale[0];
}

template <class T>
static bool can_decode(const ForwardPlan& plan) {
  const AttentionParams& p = *plan.params;
  return p.head_dim % kLanes == 0 && p.head_dim_v % kLanes == 0 && !p.bias && p.dropout_p == 0;
}

template <class T>
static int64_t decode_scratch_bytes(const ForwardPlan& plan, int64_t num_spaces) {
  const AttentionParams& p = *plan.params;
  const int64_t row = p.head_dim + p.head_dim_v + kLanes + 1;
  return 4 * (num_spaces * row + kDecodeBlock + 1) * round_up(decode_rows<T>(), 4) + 64 * 8;
}

template <class T>
ANYFLASH_INLINE void write_decoded(const ForwardPlan& plan, const Item& item,
                                   const Sequence& sequence, const DecodeRows& all, int rows,
                                   int padded) {
  const AttentionParams& p = *plan.params;
  const int columns = static_cast<int>(p.head_dim_v);
  float* partial = item.partial;
  for (int h = 0; h < item.num_spaces; ++h) {
    for (int r = 0; r < rows; ++r) {
      const float* row = all.out + (h * padded + r) * columns;
      const float max = all.max[h * padded + r] * logit_scale(p);
      const float total = sum(load(all.sum + (h * padded + r) * kLanes));
      if (partial != nullptr) {
        memcpy(partial, row, static_cast<size_t>(columns) * sizeof(float));
        partial[columns] = max;
        partial[columns + 1] = total;
        partial += partial_row_floats(p);
        continue;
      }
      const int64_t query = plan.rows.query(r), head = plan.rows.head(item.space + h, r);
      const Float sink = broadcast(p.sinks ? p.sinks[head] : -kInfinity);
      const Statistics end = finish_softmax(p, broadcast(max), broadcast(total), sink);
      T* out = query_row<T>(p, p.out, sequence, query, head);
      for (int column = 0; column < columns; column += kLanes) {
        store(out + column, load(row + column) * end.factor);
      }
      *statistic(p, p.lse, sequence, query, head) = end.lse[0];
    }
  }
}

template <class T, bool kPairs>
ANYFLASH_INLINE void decode_rows_of_item(const ForwardPlan& plan, const Item& item, char* memory) {
  using Product = DecodeProduct<T, kPairs>;
  using Query = typename Product::Query;
  const AttentionParams& p = *plan.params;
  const Sequence sequence(p, item.sequence);
  // Three rows are computed as four.
  const int rows = static_cast<int>(item.row_end), padded = rows % 4 == 3 ? rows + 1 : rows;
  const int heads = static_cast<int>(item.num_spaces);
  const int head_dim = static_cast<int>(p.head_dim), columns = static_cast<int>(p.head_dim_v);
  const int64_t kv_head = item.space * plan.rows.heads / (p.heads / p.heads_k);

  Scratch scratch{memory};
  Query* q = scratch.take<Query>(heads * padded * head_dim);
  float* scores = scratch.take<float>(padded * kDecodeBlock);
  DecodeRows all{};
  all.out = scratch.take<float>(heads * padded * columns);
  all.sum = scratch.take<float>(heads * padded * kLanes);
  all.max = scratch.take<float>(heads * padded);
  all.scale = scratch.take<float>(padded);
  if (padded > rows) memset(q, 0, sizeof(Query) * static_cast<size_t>(heads) * padded * head_dim);
  memset(all.out, 0, sizeof(float) * static_cast<size_t>(heads) * padded * columns);
  memset(all.sum, 0, sizeof(float) * static_cast<size_t>(heads) * padded * kLanes);
  memset(all.scale, 0, sizeof(float) * static_cast<size_t>(padded));
  for (int i = 0; i < heads * padded; ++i) all.max[i] = -kInfinity;
  for (int h = 0; h < heads; ++h) {
    for (int r = 0; r < rows; ++r) {
      const T* from = query_row<const T>(p, p.q, sequence, plan.rows.query(r),
                                         plan.rows.head(item.space + h, r));
      Query* to = q + (h * padded + r) * head_dim;
      if constexpr (kPairs) {
        memcpy(to, from, sizeof(T) * static_cast<size_t>(head_dim));
      } else {
        widen_row(from, head_dim, to);
      }
    }
  }

  // The rows of two blocks: the one at hand and the next. Behind the last key it is repeated.
  const T* key_rows[2][kDecodeBlock];
  const T* value_rows[2][kDecodeBlock];
  const auto find_rows = [&](int64_t first, int block) __attribute__((always_inline)) {
    const int count = static_cast<int>(smaller<int64_t>(kDecodeBlock, item.key_end - first));
    find_key_rows<T>(p, p.k, sequence, kv_head, first, count, key_rows[block]);
    find_key_rows<T>(p, p.v, sequence, kv_head, first, count, value_rows[block]);
    for (int i = count; i < kDecodeBlock; ++i) {
      key_rows[block][i] = key_rows[block][count - 1];
      value_rows[block][i] = value_rows[block][count - 1];
    }
    return count;
  };
  int block = 0;
  int count = item.key_begin < item.key_end ? find_rows(item.key_begin, 0) : 0;
  for (int64_t first = item.key_begin; first < item.key_end; first += kDecodeBlock, block ^= 1) {
    const bool last_block = first + kDecodeBlock >= item.key_end;
    const int next_count = last_block ? 0 : find_rows(first + kDecodeBlock, block ^ 1);
    for (int h = 0; h < heads; ++h) {
      const int next_block = h + 1 < heads ? block : block ^ 1;
      const int64_t next_head = h + 1 < heads ? h + 1 : 0;
      const bool prefetch = h + 1 < heads || !last_block;
      const BlockRows<T> keys{key_rows[block], h * p.k.head_stride,
                              prefetch ? key_rows[next_block] : nullptr,
                              next_head * p.k.head_stride};
      const BlockRows<T> values{value_rows[block], h * p.v.head_stride,
                                prefetch ? value_rows[next_block] : nullptr,
                                next_head * p.v.head_stride};
      const auto of_rows = [](const BlockRows<T>& x, int r) __attribute__((always_inline)) {
        return r == 0 ? x : BlockRows<T>{x.rows, x.head_offset, nullptr, 0};
      };
      const DecodeRows own{all.out + h * padded * columns, all.sum + h * padded * kLanes,
                           all.max + h * padded, all.scale};
      for_row_groups(rows, [&](int r, auto n) __attribute__((always_inline)) {
        constexpr int kRows = decltype(n)::value;
        const Query* own_q = q + (h * padded + r) * head_dim;
        float* own_scores = scores + r * kDecodeBlock;
        if (kRows == 1 && count <= kLanes / 4) {  // short sequences
          decode_scores<T, Product, 1, kLanes / 4>(own_q, head_dim, of_rows(keys, r), count,
                                                   own_scores);
        } else {
          decode_scores<T, Product, kRows>(own_q, head_dim, of_rows(keys, r), count, own_scores);
        }
      });
      for (int r = 0; r < rows; ++r) {
        const int64_t head = plan.rows.head(item.space + h, r);
        const float slope =
            p.alibi_slopes ? p.alibi_slopes[sequence.index * p.alibi_batch_stride + head] : 0.0f;
        decode_softmax(p, sequence.mask, plan.rows.query(r), slope, first, count, r, own,
                       scores + r * kDecodeBlock);
      }
      for_row_groups(rows, [&](int r, auto n) __attribute__((always_inline)) {
        decode_all_values<T, decltype(n)::value>(scores + r * kDecodeBlock, of_rows(values, r),
                                                 count, columns, own.out + r * columns,
                                                 own.scale + r);
      });
    }
    count = next_count;
  }
  write_decoded<T>(plan, item, sequence, all, rows, padded);
}

template <class T>
static void decode_item(const ForwardPlan& plan, const Item& item, char* memory) {
  if constexpr (ProductOf<T>::Type::kPerWord == 2) {
    if (plan.params->head_dim % (2 * kLanes) == 0) {
      return decode_rows_of_item<T, true>(plan, item, memory);
    }
  }
  decode_rows_of_item<T, false>(plan, item, memory);
}

}  // namespace anyflash::cpu::ANYFLASH_ISA
