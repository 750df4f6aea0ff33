// What the kernels' entry points call: plans a call and does it.
#include <new>

#include "kernels/cpu/backward_work.h"
#include "kernels/cpu/forward_work.h"

namespace anyflash::cpu {
namespace {

bool sensible(const AttentionParams& p) {
  return p.heads_k > 0 && p.heads % p.heads_k == 0 && p.head_dim > 0 && p.head_dim_v > 0;
}

template <class Work, class Kernels>
int32_t plan_and_do(const Kernels& kernels, const AttentionParams& params,
                    const CpuThreads* threads) {
  try {
    return Work(kernels, params).run(threads);
  } catch (const std::bad_alloc&) {
    return kErrorNoMemory;
  }
}

}  // namespace

int32_t run(const ForwardKernels& kernels, const AttentionParams& params,
            const CpuThreads* threads) {
  if (params.batch <= 0 || params.heads <= 0) return 0;
  if (!sensible(params)) return kErrorInvalidParams;
  return plan_and_do<ForwardWork>(kernels, params, threads);
}

int32_t run(const BackwardKernels& kernels, const AttentionParams& params,
            const CpuThreads* threads) {
  if (params.heads <= 0) return 0;
  if (!sensible(params) || params.block_table != nullptr) return kErrorInvalidParams;
  return plan_and_do<BackwardWork>(kernels, params, threads);
}

}  // namespace anyflash::cpu
