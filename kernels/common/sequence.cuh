// One sequence of a batch, wherever its rows lie: dense, packed or in pages. All lengths are read
// on the device.
#pragma once

#include "kernels/common/divisor.h"
#include "kernels/params.h"

namespace anyflash {

struct Sequence {
  int32_t index;
  int32_t seqlen_q;
  int32_t seqlen_k;  // from the first visible key on
  int32_t first_q;   // stored row of query 0
  int32_t first_k;   // stored row of key 0
};

__device__ __forceinline__ Sequence sequence_of(const AttentionParams& p, int32_t index) {
  const KeySpan<int32_t> keys = key_lengths(p).visible(index);
  Sequence s{index, int32_t(p.seqlen_q), keys.length, 0, keys.first};
  if (p.cu_seqlens_q) {
    s.first_q = p.cu_seqlens_q[index];
    s.seqlen_q = p.cu_seqlens_q[index + 1] - s.first_q;
  }
  return s;
}

// Rows of 16-bit elements of one sequence and head, a constant distance apart. What copies tiles
// walks along: from(row), first(), skip(rows).
struct StridedRows {
  char* data;
  int64_t row_bytes;

  // The row need not exist.
  __device__ __forceinline__ char* operator[](int32_t row) const { return data + row * row_bytes; }

  __device__ __forceinline__ StridedRows from(int32_t row) const {
    return {(*this)[row], row_bytes};
  }
  __device__ __forceinline__ char* first() const { return data; }
  __device__ __forceinline__ void skip(int32_t rows) { data += rows * row_bytes; }
};

// `packed`: sequences follow each other in the rows.
__device__ __forceinline__ StridedRows strided_rows(const Rows& rows, bool packed, int32_t sequence,
                                                    int32_t first_row, int32_t head) {
  const int64_t row_bytes = 2 * rows.row_stride;
  const int64_t offset = (packed ? 0 : sequence * rows.batch_stride) + head * rows.head_stride;
  return {static_cast<char*>(rows.data) + 2 * offset + first_row * row_bytes, row_bytes};
}

// Keys or values of one sequence and head; rows count from the first visible key on.
template <bool kPaged>
struct KeyRows : StridedRows {
  __device__ __forceinline__ KeyRows(const AttentionParams& p, const Rows& rows, const Divisor&,
                                     const Sequence& s, int32_t head_k)
      : StridedRows(strided_rows(rows, p.cu_seqlens_k != nullptr, s.index, s.first_k, head_k)) {}
};

// In the pages that the block table names.
template <>
struct KeyRows<true> {
  StridedRows first_page;
  int64_t page_bytes;
  const int32_t* pages;  // of the sequence
  const Divisor& page_size;
  int32_t row;
  int32_t last_row;  // behind it the table may end

  __device__ __forceinline__ KeyRows(const AttentionParams& p, const Rows& rows,
                                     const Divisor& size, const Sequence& s, int32_t head_k)
      : first_page(strided_rows(rows, true, 0, 0, head_k)),
        page_bytes(2 * rows.batch_stride),
        pages(p.block_table + s.index * p.block_table_stride),
        page_size(size),
        row(s.first_k),
        last_row(s.first_k + s.seqlen_k - 1) {}

  __device__ __forceinline__ KeyRows from(int32_t key) const {
    KeyRows rows = *this;
    rows.skip(key);
    return rows;
  }
  __device__ __forceinline__ const char* first() const {
    const uint32_t stored = uint32_t(smaller(row, last_row));
    const uint32_t page = page_size.quotient(stored);
    return first_page[int32_t(stored - page * page_size.value)] + pages[page] * page_bytes;
  }
  __device__ __forceinline__ void skip(int32_t keys) { row += keys; }
};

// Where the log-sum-exp of query 0 goes.
__device__ __forceinline__ float* statistics_of(const AttentionParams& p, const RowStatistics& x,
                                                const Sequence& s, int32_t head) {
  return x.data + (p.cu_seqlens_q ? 0 : s.index * x.batch_stride) + head * x.head_stride +
         s.first_q;
}

}  // namespace anyflash
