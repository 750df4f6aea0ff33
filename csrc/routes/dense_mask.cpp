#include "routes/dense_mask.h"

#include <algorithm>

#include "attention/results.h"
#include "routes/philox.h"

namespace anyflash {

namespace {

constexpr int64_t kScoreBytes =
    int64_t{64} << 20;  // of one chunk's scores; a handful of tensors of this size live at a time

Tensor less(const Tensor& a, const Tensor& b) { return aten<Tensor>("aten::lt", "Tensor", a, b); }
Tensor greater_equal(const Tensor& a, const Tensor& b) {
  return aten<Tensor>("aten::ge", "Tensor", a, b);
}

}  // namespace

DenseMask::DenseMask(const AttentionArgs& args, const DenseBatch& batch)
    : args_(args),
      batch_(batch),
      dtype_(accumulator_type(args.q)),
      mask_{batch.q.size(1), batch.k.size(1), args.window_left, args.window_right} {}

std::vector<Chunk> DenseMask::chunks() const {
  const int64_t row_bytes = std::max<int64_t>(
      batch_.q.size(0) * batch_.q.size(2) * mask_.seqlen_k * (dtype_ == ScalarType::Double ? 8 : 4),
      1);
  const int64_t rows =
      std::max(kScoreBytes / row_bytes / DropoutMask::kTile, int64_t{1}) * DropoutMask::kTile;
  std::vector<Chunk> result;
  for (int64_t row = 0; row < mask_.seqlen_q; row += rows) {
    Chunk chunk{row, std::min(rows, mask_.seqlen_q - row), 0, mask_.seqlen_k};
    if (!batch_.lengths_k) {
      const int64_t begin =
          std::min(mask_.kv_begin(row), mask_.seqlen_k) / DropoutMask::kTile * DropoutMask::kTile;
      const int64_t end = std::max<int64_t>(mask_.kv_end(row + chunk.rows - 1), 0);
      chunk.key = begin;
      chunk.keys = std::max<int64_t>(end - begin, 0);
    }
    result.push_back(chunk);
  }
  return result;
}

bool DenseMask::hides() const {
  return batch_.lengths_k || args_.window_left >= 0 || args_.window_right >= 0;
}

bool DenseMask::is_square_causal() const {
  return !batch_.lengths_k && args_.purely_causal() && mask_.seqlen_q == mask_.seqlen_k;
}

// (n) -> (n, 1, 1, 1)
Tensor DenseMask::per_sequence(const Tensor& x) const {
  return to_dtype(unsqueeze(unsqueeze(unsqueeze(x, -1), -1), -1), dtype_);
}

Tensor DenseMask::diagonal(const Chunk& chunk) const {
  const Tensor rows = four_dims(unsqueeze(numbers(chunk.row, chunk.rows), -1));
  if (!batch_.lengths_k) return add(rows, scalar(static_cast<double>(mask_.shift())));
  return add(rows, batch_.lengths_q
                       ? sub(per_sequence(*batch_.lengths_k), per_sequence(*batch_.lengths_q))
                       : sub(per_sequence(*batch_.lengths_k),
                             scalar(static_cast<double>(mask_.seqlen_q))));
}

// begin, begin + 1, .. in dtype_: exact up to 2^24
Tensor DenseMask::numbers(int64_t begin, int64_t count) const {
  return to_dtype(add(arange(count, batch_.q), scalar(begin)), dtype_);
}

Tensor DenseMask::hidden(const Chunk& chunk) const {
  const Tensor keys = this->keys(chunk), diagonal = this->diagonal(chunk);
  OptionalTensor result;
  const auto also = [&](const Tensor& x) {
    result = result ? aten<Tensor>("aten::bitwise_or", "Tensor", *result, x) : x;
  };
  if (args_.window_left >= 0)
    also(less(keys, sub(diagonal, scalar(static_cast<double>(args_.window_left)))));
  if (args_.window_right >= 0)
    also(less(add(diagonal, scalar(static_cast<double>(args_.window_right))), keys));
  if (batch_.lengths_k) {
    const Tensor lengths = per_sequence(*batch_.lengths_k);
    also(greater_equal(keys, lengths));
    also(greater_equal(diagonal, lengths));  // a padding row
  }
  return *result;
}

Tensor bias_chunk(const Tensor& bias, const Chunk& chunk) {
  return narrow_broadcast(narrow_broadcast(bias, 2, chunk.row, chunk.rows), 3, chunk.key,
                          chunk.keys);
}

}  // namespace anyflash
