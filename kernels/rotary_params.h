// Arguments of the rotary kernels.
#pragma once

#include "kernels/params.h"

namespace anyflash {

// y = x with its first 2 * pairs columns turned by the angles of the rows' positions, the columns
// behind them copied. Row i of a sequence stands at seqlen_offset + seqlen_offsets[sequence] + i. A
// row whose position has no angle in the tables, or that is of no sequence, is not turned. x and y
// have the instance's dtype; the arithmetic is fp32.
struct RotaryParams {
  Rows x;           // (batch, seqlen, heads, head_dim), or packed (seqlen, heads, head_dim)
  Rows y;           // the same; may be x, else must not overlap it
  const void* cos;  // (seqlen_rotary, pairs), columns contiguous, of the dtype of x or fp32
  const void* sin;  // the same
  int64_t cos_stride;
  int64_t sin_stride;
  bool tables_are_fp32;
  bool interleaved;  // the members of a pair are neighbours, else `pairs` columns apart
  bool conjugate;    // turned backwards

  const int64_t* cu_seqlens;      // (batch + 1), or null: not packed
  const int64_t* seqlen_offsets;  // (batch), may be null
  int64_t seqlen_offset;

  int64_t batch;
  int64_t seqlen;  // packed: of all sequences together
  int64_t heads;
  int64_t head_dim;
  int64_t pairs;
  int64_t seqlen_rotary;
};

}  // namespace anyflash
