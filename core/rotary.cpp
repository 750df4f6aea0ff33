#include "core/rotary.h"

#include "core/huge_pages.h"
#include "core/integers.h"
#include "core/run.h"
#include "kernels/rotary_params.h"

namespace anyflash {

void run_rotary(const Instance& instance, const RotaryCall& call, const TensorView& y,
                void* where) {
  const TensorView& x = call.x;
  if (y.data != x.data) ask_for_huge_pages(y);
  std::vector<int64_t> cu_seqlens, offsets;
  RotaryParams params{};
  params.x = rows_of(x);
  params.y = rows_of(y);
  params.cos = call.cos.data;
  params.sin = call.sin.data;
  params.cos_stride = call.cos.stride(0);
  params.sin_stride = call.sin.stride(0);
  params.tables_are_fp32 = call.cos.dtype == ElementType::fp32;
  params.interleaved = call.interleaved;
  params.conjugate = call.conjugate;
  if (call.packed()) {
    cu_seqlens = Integers(call.cu_seqlens).all();
    params.cu_seqlens = cu_seqlens.data();
  }
  if (call.seqlen_offsets.given()) {
    offsets = Integers(call.seqlen_offsets).all();
    params.seqlen_offsets = offsets.data();
  }
  params.seqlen_offset = call.seqlen_offset;
  params.batch = call.packed() ? call.cu_seqlens.size(0) - 1 : x.size(0);
  params.seqlen = call.packed() ? x.size(0) : x.size(1);
  params.heads = x.size(-2);
  params.head_dim = x.size(-1);
  params.pairs = call.cos.size(1);
  params.seqlen_rotary = call.cos.size(0);
  launch(instance, &params, where);
}

}  // namespace anyflash
