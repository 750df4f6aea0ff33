#include "cuda/attention_kernel.h"

#include <cstdint>
#include <limits>
#include <vector>

#include "attention_params.h"
#include "fallback/promised.h"
#include "launch.h"
#include "stable/aten.h"
#include "stable/cuda_shims.h"

namespace anyflash::cuda_kernel {
namespace {

// The kernels move 16 bytes at a time: 8 elements.
constexpr int64_t kPack = 8;

bool has_aligned_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (x.stride(last) != 1 || x.size(last) % kPack != 0) return false;
  for (int64_t dim = 0; dim < last; ++dim) {
    if (x.stride(dim) % kPack != 0) return false;
  }
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

// An uninitialised tensor of x's shape with aligned rows, its columns rounded up.
Tensor aligned_empty(const Tensor& x) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = (sizes.back() + kPack - 1) / kPack * kPack;
  return empty(sizes, x, x.scalar_type());
}

// x itself where its rows are aligned, else a copy with zeros in the columns that x has not.
Tensor aligned(const Tensor& x) {
  if (has_aligned_rows(x)) return x;
  const Tensor copy = aligned_empty(x);
  const int64_t last = x.dim() - 1, columns = x.size(last), more = copy.size(last) - columns;
  copy_(narrow(copy, last, 0, columns), x);
  if (more > 0) fill_(narrow(copy, last, columns, more), 0);
  return copy;
}

KernelOutput output(const Tensor& promised) {
  return {promised, has_aligned_rows(promised) ? promised : aligned_empty(promised)};
}

// Uninitialised bytes; none where the kernel needs none.
OptionalTensor workspace_for(const Instance& instance, const AttentionParams& params,
                             const Tensor& q) {
  const CudaGuard guard(q.get_device_index());
  const int64_t bytes = anyflash_attention_workspace(&instance, &params);
  return bytes == 0 ? OptionalTensor() : empty({bytes}, q, ScalarType::Byte);
}

}  // namespace

ForwardResult forward(const Instance& instance, const AttentionArgs& args) {
  const KernelOutput out = output(new_out(args));
  const Tensor lse = new_lse(args);
  if (lse.numel() == 0) return {out.finish(), lse};
  if (args.packed()) {  // how many rows behind the last sequence belong to none, the device knows
    fill_(out.written(), 0);
    fill_(lse, std::numeric_limits<double>::infinity());
  }
  AttentionInputs inputs(args, aligned(args.q), aligned(args.k), aligned(args.v));
  inputs.params.out = rows_of(out.written());
  inputs.params.lse = statistics_of(lse);
  const OptionalTensor workspace = workspace_for(instance, inputs.params, args.q);
  if (workspace) inputs.params.workspace = workspace->data_ptr();
  launch(instance, &inputs.params, args.q);
  return {out.finish(), lse};
}

}  // namespace anyflash::cuda_kernel
