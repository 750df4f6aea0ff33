// Rotary embedding on the CPU: tables are converted, the result is allocated, the core checks and
// launches.
#include "operators.h"
#include "stable/contiguous_rows.h"
#include "stable/grad_mode.h"
#include "stable/launch_on.h"
#include "stable/view.h"

namespace anyflash {
namespace {

// Room for the result: x's strides where its columns lie side by side. empty_like may put another
// dimension innermost where elements of x overlap.
Tensor layout_like(const Tensor& x) {
  const Tensor y = empty_like(x);
  return has_contiguous_rows(y) ? y : empty(x.sizes(), x, x.scalar_type());
}

// One call, checked, with what has to be converted for the kernel.
class Rotation {
 public:
  Rotation(const RotaryCall& call, const Tensor& cos, const Tensor& sin) : call_(call) {
    check_status(anyflash_prepare_rotary(&call_, &kernel_));
    const ElementType dtype = call_.x.dtype;
    const bool like_x = call_.cos.dtype == dtype && call_.sin.dtype == dtype;
    const auto table = [like_x](const Tensor& given) {
      return contiguous_rows(like_x ? given : to_dtype(given, ScalarType::Float));
    };
    cos_ = table(cos);
    sin_ = table(sin);
    call_.cos = view_of(cos_);
    call_.sin = view_of(sin_);
  }

  // y = x turned, both with rows that the kernel can read; y may be x.
  void run(const Tensor& x, const Tensor& y) {
    if (x.numel() == 0) return;
    const TensorView to = view_to_write(y);
    call_.x = view_of(x);
    const LaunchOn where(x);
    check_status(anyflash_run_rotary(kernel_, &call_, &to, where.get()));
  }

 private:
  RotaryCall call_;
  const Instance* kernel_ = nullptr;
  Tensor cos_, sin_;
};

}  // namespace

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin,
              const OptionalTensor& seqlen_offsets, int64_t seqlen_offset,
              const OptionalTensor& cu_seqlens, int64_t max_seqlen, bool interleaved,
              bool conjugate) {
  const NoGrad no_grad;
  Rotation rotation({view_of(x), view_of(cos), view_of(sin), view_of(seqlen_offsets),
                     view_of(cu_seqlens), seqlen_offset, max_seqlen, interleaved, conjugate},
                    cos, sin);
  const Tensor readable = contiguous_rows(x);
  const Tensor y = layout_like(readable);
  rotation.run(readable, y);
  return y;
}

void rotary_(const Tensor& x, const Tensor& cos, const Tensor& sin,
             const OptionalTensor& seqlen_offsets, int64_t seqlen_offset,
             const OptionalTensor& cu_seqlens, int64_t max_seqlen, bool interleaved,
             bool conjugate) {
  const NoGrad no_grad;
  Rotation rotation({view_to_write(x), view_of(cos), view_of(sin), view_of(seqlen_offsets),
                     view_of(cu_seqlens), seqlen_offset, max_seqlen, interleaved, conjugate,
                     /*in_place=*/true},
                    cos, sin);
  const Tensor readable = contiguous_rows(x);
  rotation.run(readable, readable);
  if (readable.get() != x.get()) copy_(x, readable);
}

}  // namespace anyflash
