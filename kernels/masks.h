// Every mask of the attention interface keeps one interval of keys per query row: kv_begin(row) <=
// key < kv_end(row), both ends never decreasing with the row. Tile ranges and the element test
// follow from these two formulas.
#pragma once

#include "kernels/portable.h"

namespace anyflash {

template <typename Index>
ANYFLASH_HOST_DEVICE constexpr Index smaller(Index a, Index b) {
  return a < b ? a : b;
}

template <typename Index>
ANYFLASH_HOST_DEVICE constexpr Index larger(Index a, Index b) {
  return a < b ? b : a;
}

// Tiles begin <= tile < end; empty if begin >= end.
template <typename Index>
struct TileRange {
  Index begin;
  Index end;
};

// Lengths are those of one sequence (after seqused_k and leftpad_k); windows as normalised:
// negative = unbounded, causal = right 0.
template <typename Index>
struct IntervalMask {
  Index seqlen_q;
  Index seqlen_k;
  Index window_left;
  Index window_right;

  // The last query row is aligned with the last key.
  ANYFLASH_HOST_DEVICE Index shift() const { return seqlen_k - seqlen_q; }

  ANYFLASH_HOST_DEVICE Index kv_begin(Index row) const {
    return window_left < 0 ? 0 : larger<Index>(0, row + shift() - window_left);
  }

  ANYFLASH_HOST_DEVICE Index kv_end(Index row) const {
    return window_right < 0 ? seqlen_k : smaller<Index>(seqlen_k, row + shift() + window_right + 1);
  }

  // The same seen from the keys: its rows are keys, and what they see are query rows.
  ANYFLASH_HOST_DEVICE IntervalMask transposed() const {
    return {seqlen_k, seqlen_q, window_right, window_left};
  }

  ANYFLASH_HOST_DEVICE bool visible(Index row, Index key) const {
    return kv_begin(row) <= key && key < kv_end(row);
  }

  // Key tiles in which some row of row_begin <= row < row_end sees a key.
  ANYFLASH_HOST_DEVICE TileRange<Index> tiles(Index row_begin, Index row_end, Index tile) const {
    const Index first = kv_begin(row_begin);
    const Index last = larger<Index>(0, kv_end(row_end - 1));
    return {first / tile, (last + tile - 1) / tile};
  }

  // Key tiles in which each of these rows sees every key, so that no element needs a test.
  ANYFLASH_HOST_DEVICE TileRange<Index> full_tiles(Index row_begin, Index row_end,
                                                   Index tile) const {
    const Index first = kv_begin(row_end - 1);
    const Index last = larger<Index>(0, kv_end(row_begin));
    return {(first + tile - 1) / tile, last / tile};
  }
};

}  // namespace anyflash
