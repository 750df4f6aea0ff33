#include "routes/padded.h"

#include <limits>

namespace anyflash {

namespace {

Tensor minimum(const Tensor& a, const Tensor& b) { return aten<Tensor>("aten::minimum", "", a, b); }
Tensor maximum(const Tensor& a, const Tensor& b) { return aten<Tensor>("aten::maximum", "", a, b); }
Tensor less(const Tensor& a, const Tensor& b) { return aten<Tensor>("aten::lt", "Tensor", a, b); }
Tensor both(const Tensor& a, const Tensor& b) {
  return aten<Tensor>("aten::bitwise_and", "Tensor", a, b);
}
Tensor floor_divide(const Tensor& a, int64_t b) {
  return aten<Tensor>("aten::floor_divide", "", a, scalar(b));
}
Tensor to_int64(const Tensor& x) { return to_dtype(x, ScalarType::Long); }
Tensor index_select(const Tensor& x, const Tensor& index) {
  return aten<Tensor>("aten::index_select", "", x, 0, index);
}

Tensor flat(const Tensor& x) { return reshape(x, {-1}); }

Tensor column(const Tensor& x) { return unsqueeze(x, -1); }

// lengths of `count + 1` starts
Tensor differences(const Tensor& starts, int64_t count) {
  return sub(to_int64(narrow(starts, 0, 1, count)), to_int64(narrow(starts, 0, 0, count)));
}

// Fills the rows of `x` (a fresh tensor) where `valid` (rows) is false.
Tensor fill_invalid(const Tensor& x, const Tensor& valid, double fill) {
  Tensor invalid = aten<Tensor>("aten::logical_not", "", valid);
  while (invalid.dim() < x.dim()) invalid = unsqueeze(invalid, -1);
  return aten<Tensor>("aten::masked_fill_", "Tensor", x, invalid, scalar(fill));
}

// A constant of shape `sizes` followed by the dimensions of `like` from `dim` on.
Tensor filled(std::vector<int64_t> sizes, const Tensor& like, int64_t dim, double fill) {
  sizes.insert(sizes.end(), like.sizes().begin() + dim, like.sizes().end());
  return full(sizes, fill, like, like.scalar_type());
}

// (a, b, ..) <-> (a * b, ..)
Tensor merge_rows(const Tensor& x) {
  std::vector<int64_t> sizes(x.sizes().begin() + 1, x.sizes().end());
  sizes[0] *= x.size(0);
  return reshape(x, sizes);
}
Tensor split_rows(const Tensor& x, int64_t outer, int64_t inner) {  // either may be 0
  std::vector<int64_t> sizes{outer, inner};
  sizes.insert(sizes.end(), x.sizes().begin() + 1, x.sizes().end());
  return reshape(x, sizes);
}

// Effective key lengths, or unset where every key of dense storage is used.
OptionalTensor key_lengths(const AttentionArgs& args) {
  OptionalTensor lengths;  // by the rule of kernels/lengths.h
  if (args.seqused_k) {
    lengths = to_int64(*args.seqused_k);
  } else if (args.cu_seqlens_k) {
    lengths = differences(*args.cu_seqlens_k, args.batch());
  }
  if (!lengths && !args.leftpad_k) return std::nullopt;
  if (!lengths)
    lengths = to_int64(
        full({args.batch()}, static_cast<double>(args.longest_k()), args.q, ScalarType::Double));
  if (args.leftpad_k) lengths = sub(*lengths, to_int64(*args.leftpad_k));
  return maximum(*lengths, scalar(int64_t{0}));
}

// (pages, page, ..) -> (batch, max_blocks * page, ..). A table entry beyond the used length may be
// anything: clamped, its rows are unused.
Tensor gather_pages(const Tensor& x, const Tensor& table) {
  const int64_t batch = table.size(0), rows = table.size(1) * x.size(1);
  if (x.numel() == 0) return filled({batch, rows}, x, 2, 0);
  const Tensor inside =
      maximum(minimum(to_int64(table), scalar(x.size(0) - 1)), scalar(int64_t{0}));
  return split_rows(merge_rows(index_select(x, flat(inside))), batch, rows);
}

}  // namespace

RowMap::RowMap(const OptionalTensor& starts, const Tensor& lengths, const OptionalTensor& skip,
               int64_t storage_rows, int64_t capacity, int64_t positions)
    : batch_(lengths.size(0)), positions_(positions) {
  const Tensor position = arange(positions, lengths);
  const Tensor last_row = scalar(storage_rows - 1);
  // What the last entry of `starts` says is not read: with seqused_k it may be anything.
  const Tensor begin = starts ? to_int64(narrow(*starts, 0, 0, batch_))
                              : mul(arange(batch_, lengths), scalar(capacity));
  Tensor first = begin;
  if (skip) first = add(first, to_int64(*skip));  // storage row of position 0
  to_padded_ = flat(minimum(add(column(first), position), last_row));
  padded_valid_ = flat(less(position, column(lengths)));

  const Tensor row = arange(storage_rows, lengths);
  const Tensor sequence =
      starts ? sub(aten<Tensor>("aten::bucketize", "Tensor", row, begin, false, true),
                   scalar(int64_t{1}))
             : floor_divide(row, capacity);
  const Tensor owner = maximum(minimum(sequence, scalar(batch_ - 1)), scalar(int64_t{0}));
  const Tensor offset = sub(row, index_select(first, owner));
  const Tensor limit = minimum(index_select(lengths, owner), scalar(positions));
  storage_valid_ = both(less(scalar(int64_t{-1}), offset), less(offset, limit));
  const Tensor inside = maximum(minimum(offset, scalar(positions - 1)), scalar(int64_t{0}));
  to_storage_ = add(mul(owner, scalar(positions)), inside);
}

Tensor RowMap::pad(const Tensor& storage, double fill) const {
  if (storage.size(0) == 0) return filled({batch_, positions_}, storage, 1, fill);
  return split_rows(fill_invalid(index_select(storage, to_padded_), padded_valid_, fill), batch_,
                    positions_);
}

Tensor RowMap::unpad(const Tensor& padded, double fill) const {
  if (positions_ == 0) return filled({to_storage_.size(0)}, padded, 2, fill);
  return fill_invalid(index_select(merge_rows(padded), to_storage_), storage_valid_, fill);
}

PaddedProblem::PaddedProblem(const AttentionArgs& args)
    : q(args.q), k(args.k), v(args.v), lengths_k(key_lengths(args)) {
  if (args.packed()) {
    lengths_q = differences(*args.cu_seqlens_q, args.batch());
    query_rows_.emplace(args.cu_seqlens_q, *lengths_q, std::nullopt, args.q.size(0), 0,
                        args.longest_q());
  }
  const bool packed_k = args.packed() && !args.paged();
  if (lengths_k) {
    const int64_t rows = packed_k ? args.k.size(0) : args.batch() * args.longest_k();
    key_rows_.emplace(packed_k ? args.cu_seqlens_k : std::nullopt, *lengths_k, args.leftpad_k, rows,
                      args.longest_k(), args.longest_k());
  }
  if (lengths_q && !lengths_k)
    lengths_k = to_int64(
        full({args.batch()}, static_cast<double>(args.longest_k()), q, ScalarType::Double));
  q = pad_query(args.q);
  k = pad_key(args, args.k);
  v = pad_key(args, args.v);
}

Tensor PaddedProblem::pad_query(const Tensor& x) const {
  return query_rows_ ? query_rows_->pad(x, 0) : x;
}

Tensor PaddedProblem::pad_lse(const Tensor& lse, double fill) const {
  if (!query_rows_) return lse;
  return transpose(query_rows_->pad(contiguous(transpose(lse, 0, 1)), fill), 1, 2);
}

Tensor PaddedProblem::pad_key(const AttentionArgs& args, const Tensor& x) const {
  const Tensor storage = args.paged() ? gather_pages(x, *args.block_table) : x;
  if (!key_rows_) return storage;
  return key_rows_->pad(storage.dim() == 4 ? merge_rows(storage) : storage, 0);
}

void PaddedProblem::unpad_query(const Tensor& destination, const Tensor& x, double fill) const {
  copy_(destination, query_rows_ ? query_rows_->unpad(x, fill) : x);
}

void PaddedProblem::unpad_lse(const Tensor& destination, const Tensor& x) const {
  if (!query_rows_) return copy_(destination, x);
  const double fill = std::numeric_limits<double>::infinity();
  copy_(destination, transpose(query_rows_->unpad(transpose(x, 1, 2), fill), 0, 1));
}

void PaddedProblem::unpad_key(const Tensor& destination, const Tensor& x) const {
  if (!key_rows_) return copy_(destination, x);
  const Tensor rows = key_rows_->unpad(x, 0);
  copy_(destination,
        destination.dim() == 4 ? split_rows(rows, destination.size(0), destination.size(1)) : rows);
}

}  // namespace anyflash
