// Problems whose lengths are known on the device alone: packed, paged and shortened storage as
// padded batches, without a host sync.
#pragma once

#include "attention/arguments.h"
#include "stable/aten.h"

namespace anyflash {

// Storage rows <-> (sequence, position). Index tensors point somewhere harmless wherever `valid` is
// false.
class RowMap {
 public:
  // `starts` (batch + 1) or unset for dense storage of `capacity` rows per sequence; `lengths`
  // (batch); `skip` (batch): storage rows before position 0, may be unset; `positions`: of the
  // padded batch.
  RowMap(const OptionalTensor& starts, const Tensor& lengths, const OptionalTensor& skip,
         int64_t storage_rows, int64_t capacity, int64_t positions);

  // (storage rows, ..) -> (batch, positions, ..), `fill` in padding.
  Tensor pad(const Tensor& storage, double fill) const;
  // (batch, positions, ..) -> (storage rows, ..), `fill` where a row belongs to no sequence.
  Tensor unpad(const Tensor& padded, double fill) const;

 private:
  int64_t batch_, positions_;
  Tensor to_padded_, padded_valid_;    // (batch * positions)
  Tensor to_storage_, storage_valid_;  // (storage rows)
};

// A problem with its tensors padded. Everything the maps leave alone is the original tensor.
class PaddedProblem {
 public:
  explicit PaddedProblem(const AttentionArgs& args);

  Tensor q, k, v;                       // (batch, rows, heads, head_dim) ..., unused keys zero
  OptionalTensor lengths_q, lengths_k;  // (batch) int64, unset where all are full

  Tensor pad_query(const Tensor& x) const;               // laid out like q; zeros in padding
  Tensor pad_lse(const Tensor& lse, double fill) const;  // -> (batch, heads, rows)
  void unpad_query(const Tensor& destination, const Tensor& x, double fill) const;
  void unpad_lse(const Tensor& destination, const Tensor& x) const;
  void unpad_key(const Tensor& destination,
                 const Tensor& x) const;  // laid out like k, zeros in unused storage
  bool packed() const { return query_rows_.has_value(); }

 private:
  Tensor pad_key(const AttentionArgs& args, const Tensor& x) const;

  std::optional<RowMap> query_rows_, key_rows_;
};

}  // namespace anyflash
