// One sequence of a batch, wherever its rows lie: dense, packed or in pages. All lengths are read
// on the device.
#pragma once

#include "kernels/common/divisor.h"
#include "kernels/common/ptx.cuh"
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

// Tiles of packed rows, `group` rows to a token. Sequence i begins with tile
// floor(cu_seqlens[i] * group / kRows) + i: late enough for the tiles of those before, and known
// without them. Some tiles have no rows. What follows the last sequence counts as one more.
template <int32_t kRows>
struct PackedTile {
  int32_t sequence;
  int32_t row_tile;  // of the sequence

  // Of the first `sequences`. A warp searches together: 32 of them at a time.
  __device__ __forceinline__ static PackedTile find(const int32_t* cu_seqlens, int64_t sequences,
                                                    int64_t group, int32_t tile) {
    int32_t low = 0, high = int32_t(sequences);  // low <= sequence < high
    while (high - low > 1) {
      const int32_t step = (high - low + 31) / 32;
      const int32_t probe = low + int32_t(threadIdx.x % 32) * step;
      const bool begun = probe < high && first(cu_seqlens, group, probe) <= tile;
      low += (ptx::count_lanes(begun) - 1) * step;
      high = smaller(high, low + step);
    }
    return {low, tile - first(cu_seqlens, group, low)};
  }

  __device__ __forceinline__ static int32_t first(const int32_t* cu_seqlens, int64_t group,
                                                  int32_t sequence) {
    return int32_t(cu_seqlens[sequence] * group / kRows) + sequence;
  }
};

// The rows behind the last packed sequence: without keys, so they become what such rows are.
__device__ __forceinline__ Sequence rest_of(const AttentionParams& p) {
  const int32_t first = p.cu_seqlens_q[p.batch];
  return {int32_t(p.batch), int32_t(p.total_q) - first, 0, first, 0};
}

// The same of keys, whose gradients are zeros.
__device__ __forceinline__ Sequence rest_of_keys(const AttentionParams& p) {
  const int32_t first = p.cu_seqlens_k[p.batch];
  return {int32_t(p.batch), 0, int32_t(p.total_k) - first, 0, first};
}

// Rows of 16-bit elements of one sequence and head, a constant distance apart. What copies tiles
// walks along.
struct StridedRows {
  char* data;
  int64_t row_bytes;

  // The row need not exist.
  __device__ __forceinline__ char* operator[](int32_t row) const { return data + row * row_bytes; }

  __device__ __forceinline__ StridedRows from(int32_t row, int32_t byte) const {
    return {(*this)[row] + byte, row_bytes};
  }
  __device__ __forceinline__ char* chunk(int32_t row) const { return (*this)[row]; }
  __device__ __forceinline__ void pin() { data = ptx::opaque(data); }
  // So many bytes, which the caller knows to be rows.
  __device__ __forceinline__ void skip(int64_t bytes) { data += bytes; }
};

// `packed`: sequences follow each other in the rows.
__device__ __forceinline__ StridedRows strided_rows(const Rows& rows, bool packed, int32_t sequence,
                                                    int32_t first_row, int32_t head) {
  const int64_t row_bytes = 2 * rows.row_stride;
  const int64_t offset = (packed ? 0 : sequence * rows.batch_stride) + head * rows.head_stride;
  return {static_cast<char*>(rows.data) + 2 * offset + first_row * row_bytes, row_bytes};
}

// Queries of the heads that share a key head: row = token * group + head within the group.
struct GroupRows {
  StridedRows tokens;  // of the group's first head
  int64_t head_bytes;
  const Divisor& group;
  int32_t row;

  __device__ __forceinline__ GroupRows(const AttentionParams& p, const Rows& rows,
                                       const Divisor& heads, const Sequence& s, int32_t first_head)
      : tokens(strided_rows(rows, p.cu_seqlens_q != nullptr, s.index, s.first_q, first_head)),
        head_bytes(2 * rows.head_stride),
        group(heads),
        row(0) {}

  __device__ __forceinline__ GroupRows from(int32_t first, int32_t byte) const {
    GroupRows rows = *this;
    rows.tokens.data += byte;
    rows.row += first;
    return rows;
  }
  __device__ __forceinline__ char* chunk(int32_t further) const {
    const uint32_t at = uint32_t(row + further);
    const uint32_t token = group.quotient(at);
    return tokens[int32_t(token)] + (at - token * group.value) * head_bytes;
  }
  __device__ __forceinline__ void pin() {}
};

// Where the log-sum-exp of query 0 goes.
__device__ __forceinline__ float* statistics_of(const AttentionParams& p, const RowStatistics& x,
                                                const Sequence& s, int32_t head) {
  return x.data + (p.cu_seqlens_q ? 0 : s.index * x.batch_stride) + head * x.head_stride +
         s.first_q;
}

}  // namespace anyflash
