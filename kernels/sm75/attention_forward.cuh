// Attention forward for sm_75 (T4): that of sm_80, whose tiles come through registers and whose
// products are two of half the depth; docs/kernels/sm75.md. Few rows over many keys take the same
// kernel with the keys cut into parts: the forward then reads them nearly as fast as T4's memory.
#pragma once

#include "kernels/sm80/attention_forward.cuh"

namespace anyflash::sm75 {

template <typename T, int32_t kMaxHeadDim>
int32_t launch_forward(const AttentionParams& p, void* stream) {
  if (!sm80::is_valid(p, kMaxHeadDim)) return kErrorInvalidParams;
  const sm80::Plan plan =
      sm80::plan_of(p, device_limits().multiprocessors, sm80::kernels_of(75, kMaxHeadDim));
  return sm80::launch_forward_kernel<T, kMaxHeadDim, kMaxHeadDim, 75>(p, plan, stream);
}

}  // namespace anyflash::sm75
