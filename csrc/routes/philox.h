// The dropout bits of kernels/philox.h, composed from integer operators so that they are drawn on
// any device without a host sync.
#pragma once

#include <array>

#include "attention/arguments.h"
#include "stable/aten.h"

namespace anyflash {

class DropoutMask {
 public:
  static constexpr int64_t kTile = 16;  // row and key ranges begin at multiples of it

  // args.rng_state is set.
  explicit DropoutMask(const AttentionArgs& args);

  // Which probabilities are dropped: bool (sequences * heads, rows, keys) for sequences from
  // `sequence` on.
  Tensor dropped(int64_t sequence, int64_t sequences, int64_t row, int64_t rows, int64_t key,
                 int64_t keys) const;
  double kept_scale() const { return kept_scale_; }

 private:
  static constexpr int kRounds = 7;

  const int64_t heads_;
  const double kept_scale_;
  const Tensor threshold_;                               // 0-d
  std::array<std::pair<Tensor, Tensor>, kRounds> keys_;  // 0-d, of each round
  Tensor offset_;                                        // 0-d
};

}  // namespace anyflash
