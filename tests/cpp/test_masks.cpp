#include "catch.h"
#include "kernels/masks.h"

using anyflash::IntervalMask;

namespace {

// The definition in words: key j is visible to row i if it lies in the window around i + shift.
bool visible(int row, int key, const IntervalMask<int>& mask) {
  const int diagonal = row + mask.seqlen_k - mask.seqlen_q;
  return (mask.window_left < 0 || key >= diagonal - mask.window_left) &&
         (mask.window_right < 0 || key <= diagonal + mask.window_right);
}

template <typename Check>
void for_every_mask(Check check) {
  for (int seqlen_q = 1; seqlen_q <= 9; ++seqlen_q) {
    for (int seqlen_k = 0; seqlen_k <= 9; ++seqlen_k) {
      for (int left = -1; left <= 10; ++left) {
        for (int right = -1; right <= 10; ++right)
          check(IntervalMask<int>{seqlen_q, seqlen_k, left, right});
      }
    }
  }
}

}  // namespace

TEST_CASE("masks: an interval per row is the definition", "[masks]") {
  int wrong = 0;
  for_every_mask([&](const IntervalMask<int>& mask) {
    for (int row = 0; row < mask.seqlen_q; ++row) {
      for (int key = 0; key < mask.seqlen_k; ++key)
        wrong += mask.visible(row, key) != visible(row, key, mask);
    }
  });
  CHECK(wrong == 0);
}

TEST_CASE("masks: both ends never decrease", "[masks]") {
  int wrong = 0;
  for_every_mask([&](const IntervalMask<int>& mask) {
    for (int row = 1; row < mask.seqlen_q; ++row) {
      wrong +=
          mask.kv_begin(row) < mask.kv_begin(row - 1) || mask.kv_end(row) < mask.kv_end(row - 1);
    }
  });
  CHECK(wrong == 0);
}

TEST_CASE(
    "masks: tiles holds every tile with a visible key, full_tiles only tiles without a hidden one",
    "[masks]") {
  int missing = 0, useless = 0, not_full = 0, full_missed = 0;
  for_every_mask([&](const IntervalMask<int>& mask) {
    for (int row_begin = 0; row_begin < mask.seqlen_q; ++row_begin) {
      for (int row_end = row_begin + 1; row_end <= mask.seqlen_q; ++row_end) {
        for (int tile = 1; tile <= 4; ++tile) {
          const auto tiles = mask.tiles(row_begin, row_end, tile);
          const auto full_tiles = mask.full_tiles(row_begin, row_end, tile);
          const int num_tiles = (mask.seqlen_k + tile - 1) / tile;
          useless += tiles.begin < tiles.end && (tiles.begin < 0 || tiles.end > num_tiles);
          for (int t = 0; t < num_tiles; ++t) {
            bool any = false, all = (t + 1) * tile <= mask.seqlen_k;
            for (int row = row_begin; row < row_end; ++row) {
              for (int key = t * tile; key < (t + 1) * tile && key < mask.seqlen_k; ++key) {
                any |= visible(row, key, mask);
                all &= visible(row, key, mask);
              }
            }
            const bool in_full = full_tiles.begin <= t && t < full_tiles.end;
            missing += any && !(tiles.begin <= t && t < tiles.end);
            not_full += in_full && !all;
            full_missed += all && !in_full;
          }
        }
      }
    }
  });
  CHECK(missing == 0);
  CHECK(useless == 0);
  CHECK(not_full == 0);
  CHECK(full_missed == 0);
}

TEST_CASE("masks: transposed, keys see the rows that see them", "[masks]") {
  int wrong = 0;
  for_every_mask([&](const IntervalMask<int>& mask) {
    for (int row = 0; row < mask.seqlen_q; ++row) {
      for (int key = 0; key < mask.seqlen_k; ++key) {
        wrong += mask.transposed().visible(key, row) != visible(row, key, mask);
      }
    }
  });
  CHECK(wrong == 0);
}

TEST_CASE("masks: 64-bit lengths", "[masks]") {
  const int64_t length = int64_t{1} << 40;
  const IntervalMask<int64_t> mask{length, length, 10, 0};
  CHECK(mask.kv_begin(length - 1) == length - 11);
  CHECK(mask.kv_end(length - 1) == length);
}
