// One call of the rotary embedding as data. Shapes and semantics: csrc/schemas.def.
#pragma once

#include "core/tensor_view.h"

namespace anyflash {

struct RotaryCall {
  TensorView x;    // (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens
  TensorView cos;  // (seqlen_rotary, rotary_dim / 2), a floating dtype
  TensorView sin;  // the same
  TensorView seqlen_offsets;  // (batch) int32 or int64
  TensorView cu_seqlens;      // (batch + 1) int32 or int64
  int64_t seqlen_offset = 0;
  int64_t max_seqlen = 0;  // packed: of the longest sequence
  bool interleaved = false;
  bool conjugate = false;
  bool in_place = false;

  bool packed() const { return cu_seqlens.given(); }
};

// Refuses what cannot be computed; values of index tensors where TensorView::host has them.
void check_rotary(const RotaryCall& call);

// Runs the kernel on the CPU: y = x turned. `call` is checked. Columns of x, y, cos and sin lie
// side by side, the tables have x's dtype or are fp32; y may be x. `where` is a CpuThreads.
void run_rotary(const Instance& instance, const RotaryCall& call, const TensorView& y, void* where);

}  // namespace anyflash
