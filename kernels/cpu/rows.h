// Rows of q, k and v on their way into the products: where they lie, and the two forms they take.
//
// "Words along the row" (the A side, or B after a transposition): a float per element, or for bf16
// products two neighbouring elements per Word. "Zipped": two neighbouring rows per Word, element by
// element (the B side, and keys and values as A). For fp32 products both are plain floats.
#pragma once

#include "kernels/cpu/product.h"
#include "kernels/cpu/work.h"

namespace anyflash::cpu::ANYFLASH_ISA {

template <class T>
struct ProductOf {
  using Type = Fp32Product;
};
#if defined(ANYFLASH_TILES)
template <>
struct ProductOf<Bf16> {
  using Type = TileProduct;
};
#elif defined(__AVX512BF16__)
template <>
struct ProductOf<Bf16> {
  using Type = Bf16Product;
};
#endif

constexpr int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

template <class Product>
ANYFLASH_INLINE int words_per_row(int64_t head_dim) {
  return static_cast<int>((head_dim + Product::kPerWord - 1) / Product::kPerWord);
}

// Parts of a thread's scratch memory, each on its own cache lines.
struct Scratch {
  char* next;

  template <class T>
  __attribute__((always_inline)) T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(next);
    next += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return part;
  }
};

// ---- Where rows lie.

template <class T>
ANYFLASH_INLINE T* row_of(const Rows& x, bool packed, int64_t sequence, int64_t row, int64_t head) {
  return static_cast<T*>(x.data) + (packed ? 0 : sequence * x.batch_stride) + row * x.row_stride +
         head * x.head_stride;
}

template <class T>
ANYFLASH_INLINE T* query_row(const AttentionParams& p, const Rows& x, const Sequence& sequence,
                             int64_t query, int64_t head) {
  return row_of<T>(x, p.cu_seqlens_q != nullptr, sequence.index, sequence.q_row + query, head);
}

ANYFLASH_INLINE float* statistic(const AttentionParams& p, const RowStatistics& x,
                                 const Sequence& sequence, int64_t query, int64_t head) {
  return x.data + (p.cu_seqlens_q ? 0 : sequence.index * x.batch_stride) + head * x.head_stride +
         sequence.q_row + query;
}

// rows[i]: key `first + i` of the sequence, from whatever page it lies on.
template <class T, class Row>
ANYFLASH_INLINE void find_key_rows(const AttentionParams& p, const Rows& x,
                                   const Sequence& sequence, int64_t kv_head, int64_t first,
                                   int count, Row* rows) {
  int64_t position = sequence.k_row + first;
  if (p.block_table == nullptr) {
    const T* row = row_of<const T>(x, p.cu_seqlens_k != nullptr, sequence.index, position, kv_head);
    for (int i = 0; i < count; ++i, row += x.row_stride) rows[i] = row;
    return;
  }
  const int32_t* table = p.block_table + sequence.index * p.block_table_stride;
  int64_t page = position / p.page_size, offset = position % p.page_size;
  for (int i = 0; i < count;) {
    const T* row = row_of<const T>(x, false, table[page], offset, kv_head);
    for (; i < count && offset < p.page_size; ++i, ++offset, row += x.row_stride) rows[i] = row;
    offset = 0;
    ++page;
  }
}

// Into the second-level cache.
template <class T>
ANYFLASH_INLINE void prefetch_row(const T* row, int columns) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(T));
  for (int i = 0; i < columns; i += kLine) __builtin_prefetch(row + i, 0, 2);
}

// ---- The forms of a row.

// `count` numbers of any storage type as floats; up to the next multiple of kLanes, 0.
template <class T>
ANYFLASH_INLINE void widen_row(const T* row, int count, float* out) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(row + i));
  if (i < count) store_some(out + i, load_some(row + i, count - i), count - i);
}

// The way back: `scale` times a row of floats as T.
template <class T>
ANYFLASH_INLINE void narrow_scaled(const float* row, int columns, float scale, T* out) {
  for (int i = 0; i < columns; i += kLanes) {
    store_some(out + i, load(row + i) * scale, columns - i);
  }
}

// Words along the row: out[i * words_per_row + ...].
template <class Product, class T>
ANYFLASH_INLINE void words_along_rows(const T* const* rows, int count, int head_dim, Word* out) {
  const int words = words_per_row<Product>(head_dim);
  for (int i = 0; i < count; ++i, out += words) {
    if constexpr (Product::kPerWord == 1) {
      widen_row(rows[i], head_dim, reinterpret_cast<float*>(out));
    } else {
      // Not all in one call of memcpy, which would cost as much as the copy.
      const int whole = head_dim / (2 * kLanes) * (2 * kLanes);
      for (int column = 0; column < whole; column += 2 * kLanes) {
        store_words(out + column / 2, load_words(rows[i] + column));
      }
      if (whole == head_dim) continue;
      out[words - 1] = 0;
      memcpy(out + whole / 2, rows[i] + whole, static_cast<size_t>(head_dim - whole) * sizeof(T));
    }
  }
}

// Zipped: out[i / kPerWord * columns + column]; columns >= head_dim, those from head_dim on are
// not written. An odd last row is zipped with zeros.
template <class Product, class T>
ANYFLASH_INLINE void zipped_rows(const T* const* rows, int count, int head_dim, int columns,
                                 Word* out) {
  for (int i = 0; i < count; i += Product::kPerWord, out += columns) {
    if constexpr (Product::kPerWord == 1) {
      widen_row(rows[i], head_dim, reinterpret_cast<float*>(out));
    } else {
      const T* a = rows[i];
      const T* b = i + 1 < count ? rows[i + 1] : nullptr;
      int column = 0;
      if (b != nullptr) {
#if defined(__AVX512BF16__)
        for (; column + 2 * kLanes <= head_dim; column += 2 * kLanes) {
          const WordsPair both = zipped_twice(a + column, b + column);
          store_words(out + column, both.first);
          store_words(out + column + kLanes, both.second);
        }
#endif
        for (; column + kLanes <= head_dim; column += kLanes) {
          store_words(out + column, zipped(a + column, b + column));
        }
      }
      for (; column < head_dim; ++column) {
        out[column] = a[column].bits | (b ? Word{b[column].bits} << 16 : Word{0});
      }
    }
  }
}

// out[column * out_row + row] = row_at(row)[column]. Lanes beyond `rows`, up to a multiple of
// kLanes, are 0; reads stay within the `columns` of each row.
template <class RowAt>
ANYFLASH_INLINE void transpose_rows(RowAt row_at, int rows, int columns, Word* out,
                                    int64_t out_row) {
  for (int row = 0; row < rows; row += kLanes) {
    for (int column = 0; column < columns; column += kLanes) {
      const int width = columns - column < kLanes ? columns - column : kLanes;
      Words block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] =
            row + i < rows
                ? (Words)load_some(reinterpret_cast<const float*>(row_at(row + i) + column), width)
                : Words{};
      }
      transpose_in_registers(block);
      for (int i = 0; i < width; ++i) store_words(out + (column + i) * out_row + row, block[i]);
    }
  }
}

ANYFLASH_INLINE void transpose(const Word* in, int64_t in_row, int rows, int columns, Word* out,
                               int64_t out_row) {
  const auto row_at = [&](int row) __attribute__((always_inline)) { return in + row * in_row; };
  transpose_rows(row_at, rows, columns, out, out_row);
}

// Keys or values as the A of a product over keys: where its rows, the columns, and its steps, keys
// or pairs of them, lie. Zipped they come as they are. Tiles want the steps side by side.
struct OverKeys {
  int64_t row;
  int64_t step;
};

// Of `keys` at most, a multiple of 2 * kLanes.
template <class Product>
ANYFLASH_INLINE OverKeys over_keys(int columns, int64_t keys) {
  return Product::kTiles ? OverKeys{keys / Product::kPerWord, 1} : OverKeys{1, columns};
}

#if defined(ANYFLASH_TILES)
// `width` of 2 * kLanes columns of two neighbouring rows, zipped; without a row, zeros.
ANYFLASH_INLINE WordsPair zipped_or_zeros(const Bf16* a, const Bf16* b, int width) {
  if (a == nullptr) return WordsPair{};
  if (b != nullptr && width == 2 * kLanes) return zipped_twice(a, b);
  alignas(64) Bf16 some[2][2 * kLanes] = {};
  memcpy(some[0], a, static_cast<size_t>(width) * sizeof(Bf16));
  if (b != nullptr) memcpy(some[1], b, static_cast<size_t>(width) * sizeof(Bf16));
  return zipped_twice(some[0], some[1]);
}
#endif

template <class Product, class T>
ANYFLASH_INLINE void keys_as_a(const T* const* rows, int count, int columns, const OverKeys& at,
                               Word* out) {
#if defined(ANYFLASH_TILES)
  if constexpr (Product::kTiles) {
    constexpr int kWide = 2 * kLanes;
    for (int key = 0; key < count; key += kWide) {
      for (int column = 0; column < columns; column += kWide) {
        const int width = columns - column < kWide ? columns - column : kWide;
        const auto row = [&](int i) __attribute__((always_inline)) {
          return key + i < count ? rows[key + i] + column : nullptr;
        };
        Words halves[2][kLanes];  // of the columns
        for (int i = 0; i < kLanes; ++i) {
          const WordsPair both = zipped_or_zeros(row(2 * i), row(2 * i + 1), width);
          halves[0][i] = both.first;
          halves[1][i] = both.second;
        }
        transpose_in_registers(halves[0]);
        transpose_in_registers(halves[1]);
        for (int i = 0; i < width; ++i) {
          store_words(out + (column + i) * at.row + key / 2, halves[i / kLanes][i % kLanes]);
        }
      }
    }
    return;
  }
#endif
  zipped_rows<Product>(rows, count, columns, static_cast<int>(at.step), out);
}

}  // namespace anyflash::cpu::ANYFLASH_ISA
