// Attention backward for sm_75 (T4): that of sm_80 in its deterministic form, dq by a kernel of its
// own; docs/kernels/sm75.md.
#pragma once

#include "kernels/sm80/attention_backward.cuh"

namespace anyflash::sm75 {

template <typename T, int32_t kMaxHeadDim>
int32_t launch_backward(const AttentionParams& p, void* stream) {
  if (!sm80::is_valid_backward(p, kMaxHeadDim)) return kErrorInvalidParams;
  return sm80::launch_backward_of<T, kMaxHeadDim, kMaxHeadDim, 75>(p, kMaxHeadDim, stream);
}

}  // namespace anyflash::sm75
