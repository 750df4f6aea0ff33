// How one attention problem is cut into calls of an attention that knows no mask, the top-left
// causal mask, or an explicit one.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/masks.h"

namespace anyflash {

// Rows [row_begin, row_end) against keys [key_begin, key_end) of one sequence.
struct Piece {
  enum class Mask : int32_t {
    kNone,      // every row sees every key
    kCausal,    // square: row row_begin + i sees keys key_begin .. key_begin + i
    kInterval,  // the element test of the problem's IntervalMask
  };
  int64_t row_begin, row_end;
  int64_t key_begin, key_end;
  Mask mask;
  bool merges;  // more keys for the rows of the piece before it: the two results are merged by
                // their log-sum-exp

  int64_t rows() const { return row_end - row_begin; }
  int64_t keys() const { return key_end - key_begin; }
};

// Pieces in the order of their rows, each visible (row, key) in exactly one. Rows outside
// [row_begin, row_end) see no key; in each piece that does not merge every row sees one.
struct Plan {
  int64_t row_begin = 0, row_end = 0;
  std::vector<Piece> pieces;
};

enum class PlanFor : int32_t {
  kForward,
  kBackward,  // pieces share few keys: what several of them add to a key's gradient costs passes
              // over memory
  kExplicit,  // neither causal nor merging pieces: the scores are masked explicitly anyway, or
              // must be
};

Plan plan_pieces(const IntervalMask<int64_t>& mask, PlanFor purpose);

}  // namespace anyflash
