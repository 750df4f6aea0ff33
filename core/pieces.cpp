#include "core/pieces.h"

#include <algorithm>

namespace anyflash {

namespace {

// Measured on PyTorch 2.13: its causal attention skips invisible keys only from about this many
// rows on; below it, one call with a mask (or, in the forward, a few) is faster than two without.
constexpr int64_t kCausalMinRows = 1024;
// Rows per piece where masks are explicit: few enough to skip most invisible keys, enough for large
// matrix products.
constexpr int64_t kChunkMinRows = 64;
constexpr int64_t kCausalChunkRows = 192;
constexpr int64_t kChunkMaxRows = 512;

class Planner {
 public:
  Planner(const IntervalMask<int64_t>& mask, PlanFor purpose) : mask_(mask), purpose_(purpose) {}

  Plan run() {
    // Both interval ends never decrease, so the rows with keys are one range, and so are those that
    // see the first key.
    plan_.row_begin = first_row([&](int64_t row) { return mask_.kv_end(row) > 0; }, 0);
    plan_.row_end =
        first_row([&](int64_t row) { return mask_.kv_begin(row) >= mask_.seqlen_k; }, 0);
    plan_.row_begin = std::min(plan_.row_begin, plan_.row_end);
    const int64_t windowed =
        std::clamp(first_row([&](int64_t row) { return mask_.kv_begin(row) > 0; }, plan_.row_begin),
                   plan_.row_begin, plan_.row_end);
    if (purpose_ == PlanFor::kExplicit) {
      add_chunks(plan_.row_begin, plan_.row_end, chunk_rows());
    } else {
      add_from_first_key(plan_.row_begin, windowed);
      add_chunks(windowed, plan_.row_end, chunk_rows());
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
    // Rows before `full` see one key more than their predecessor; `full` is the first that sees the
    // last key.
    const int64_t full =
        first_row([&](int64_t row) { return mask_.kv_end(row) == mask_.seqlen_k; }, begin);
    if (full > begin) {
      const int64_t growing_end = std::min(end, full + 1);
      add_growing(begin, growing_end);
      begin = growing_end;
    }
    if (begin < end) add(begin, end, 0, mask_.seqlen_k, Piece::Mask::kNone);
  }

  void add_growing(int64_t begin, int64_t end) {
    const int64_t common =
        mask_.kv_end(begin) - 1;  // keys before it are seen by all, then a square triangle
    const int64_t rows = end - begin;
    if (common == 0) {
      add(begin, end, 0, rows, Piece::Mask::kCausal);
    } else if (rows >= kCausalMinRows) {
      add(begin, end, 0, common, Piece::Mask::kNone);
      add(begin, end, common, common + rows, Piece::Mask::kCausal, /*merges=*/true);
    } else {
      add_chunks(begin, end,
                 purpose_ == PlanFor::kForward && rows > kCausalChunkRows * 3 / 2 ? kCausalChunkRows
                                                                                  : rows);
    }
  }

  int64_t chunk_rows() const {
    if (mask_.window_left < 0) return mask_.window_right < 0 ? mask_.seqlen_q : kChunkMaxRows;
    const int64_t window = mask_.window_left + std::max<int64_t>(mask_.window_right, 0) + 1;
    return std::clamp((window / 2 + 31) / 32 * 32, kChunkMinRows, kChunkMaxRows);
  }

  void add_chunks(int64_t begin, int64_t end, int64_t chunk) {
    for (int64_t row = begin; row < end; row += chunk) {
      const int64_t row_end = std::min(row + chunk, end);
      const int64_t key_begin = mask_.kv_begin(row);
      const int64_t key_end = mask_.kv_end(row_end - 1);
      const bool full = mask_.kv_begin(row_end - 1) == key_begin && mask_.kv_end(row) == key_end;
      add(row, row_end, key_begin, key_end, full ? Piece::Mask::kNone : Piece::Mask::kInterval);
    }
  }

  const IntervalMask<int64_t> mask_;
  const PlanFor purpose_;
  Plan plan_;
};

}  // namespace

Plan plan_pieces(const IntervalMask<int64_t>& mask, PlanFor purpose) {
  if (mask.seqlen_q <= 0 || mask.seqlen_k <= 0) return {};
  return Planner(mask, purpose).run();
}

}  // namespace anyflash
