#include "fallback/promised.h"

namespace anyflash {
namespace {

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t dim = 0; dim < a.dim(); ++dim) {
    if (a.size(dim) > 1 && a.stride(dim) != b.stride(dim)) return false;
  }
  return true;
}

}  // namespace

Tensor as_promised(const Tensor& x, const Tensor& like) {
  const bool same_type = x.scalar_type() == like.scalar_type();
  if (same_type && same_strides(x, like)) return x;
  const Tensor result = empty_like(like);
  if (same_type && same_strides(x, result)) return x;
  copy_(result, x);
  return result;
}

Tensor zeros_like(const Tensor& x) {
  const Tensor result = empty_like(x);
  fill_(result, 0);
  return result;
}

Gradients promised_gradients(const AttentionArgs& args, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  return {as_promised(dq, args.q), as_promised(dk, args.k), as_promised(dv, args.v), std::nullopt, std::nullopt};
}

}  // namespace anyflash
