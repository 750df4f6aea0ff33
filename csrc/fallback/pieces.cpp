#include "fallback/pieces.h"

#include <algorithm>

namespace anyflash {

namespace {

// Up to this many rows, one call with a mask is faster than two merged calls without.
constexpr int64_t kMergeMinRows = 32;
// Rows per piece where masks are explicit: few enough to skip most invisible keys, enough to keep the threads busy.
constexpr int64_t kChunkMinRows = 64;
constexpr int64_t kChunkMaxRows = 512;

class Planner {
 public:
  Planner(const IntervalMask<int64_t>& mask, bool explicit_masks)
      : mask_(mask), explicit_masks_(explicit_masks) {}

  Plan run() {
    // Both interval ends never decrease, so the rows with keys are one range, and so are those that see the first key.
    plan_.row_begin = first_row([&](int64_t row) { return mask_.kv_end(row) > 0; }, 0);
    plan_.row_end = first_row([&](int64_t row) { return mask_.kv_begin(row) >= mask_.seqlen_k; }, 0);
    plan_.row_begin = std::min(plan_.row_begin, plan_.row_end);
    const int64_t windowed = std::clamp(
        first_row([&](int64_t row) { return mask_.kv_begin(row) > 0; }, plan_.row_begin),
        plan_.row_begin, plan_.row_end);
    if (explicit_masks_) {
      add_chunks(plan_.row_begin, plan_.row_end);
    } else {
      add_from_first_key(plan_.row_begin, windowed);
      add_chunks(windowed, plan_.row_end);
    }
    return std::move(plan_);
  }

 private:
  // The first row from `row` on for which the monotone condition holds, or seqlen_q.
  template <class Condition>
  int64_t first_row(Condition condition, int64_t row) const {
    int64_t end = mask_.seqlen_q;
    while (row < end) {
      const int64_t middle = row + (end - row) / 2;
      if (condition(middle)) {
        end = middle;
      } else {
        row = middle + 1;
      }
    }
    return row;
  }

  void add(int64_t row_begin, int64_t row_end, int64_t key_begin, int64_t key_end, Piece::Mask mask,
           bool merges = false) {
    plan_.pieces.push_back({row_begin, row_end, key_begin, key_end, mask, merges});
  }

  // Rows that see keys [0, kv_end(row)).
  void add_from_first_key(int64_t begin, int64_t end) {
    if (begin >= end) return;
    // Rows before `full` see one key more than their predecessor; `full` is the first that sees the last key.
    const int64_t full = first_row([&](int64_t row) { return mask_.kv_end(row) == mask_.seqlen_k; }, begin);
    if (full > begin) {
      const int64_t growing_end = std::min(end, full + 1);
      add_growing(begin, growing_end);
      begin = growing_end;
    }
    if (begin < end) add(begin, end, 0, mask_.seqlen_k, Piece::Mask::kNone);
  }

  void add_growing(int64_t begin, int64_t end) {
    const int64_t common = mask_.kv_end(begin) - 1;  // keys before it are seen by all, then a square triangle
    const int64_t key_end = common + (end - begin);
    if (common == 0) {
      add(begin, end, 0, key_end, Piece::Mask::kCausal);
    } else if (end - begin == 1) {
      add(begin, end, 0, key_end, Piece::Mask::kNone);
    } else if (end - begin < kMergeMinRows) {
      add(begin, end, 0, key_end, Piece::Mask::kInterval);
    } else {
      add(begin, end, 0, common, Piece::Mask::kNone);
      add(begin, end, common, key_end, Piece::Mask::kCausal, /*merges=*/true);
    }
  }

  void add_chunks(int64_t begin, int64_t end) {
    const bool masked = mask_.window_left >= 0 || mask_.window_right >= 0;
    int64_t chunk = masked ? kChunkMaxRows : end - begin;
    if (mask_.window_left >= 0) {
      const int64_t window = mask_.window_left + std::max<int64_t>(mask_.window_right, 0) + 1;
      chunk = std::clamp((window / 2 + 31) / 32 * 32, kChunkMinRows, kChunkMaxRows);
    }
    for (int64_t row = begin; row < end; row += chunk) {
      const int64_t row_end = std::min(row + chunk, end);
      const int64_t key_begin = mask_.kv_begin(row);
      const int64_t key_end = mask_.kv_end(row_end - 1);
      const bool full = mask_.kv_begin(row_end - 1) == key_begin && mask_.kv_end(row) == key_end;
      add(row, row_end, key_begin, key_end, full ? Piece::Mask::kNone : Piece::Mask::kInterval);
    }
  }

  const IntervalMask<int64_t> mask_;
  const bool explicit_masks_;
  Plan plan_;
};

}  // namespace

Plan plan_pieces(const IntervalMask<int64_t>& mask, bool explicit_masks) {
  if (mask.seqlen_q <= 0 || mask.seqlen_k <= 0) return {};
  return Planner(mask, explicit_masks).run();
}

}  // namespace anyflash
