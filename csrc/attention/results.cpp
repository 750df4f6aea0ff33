#include "attention/results.h"

#include <limits>

namespace anyflash {

namespace {

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t dim = 0; dim < a.dim(); ++dim) {
    if (a.size(dim) > 1 && a.stride(dim) != b.stride(dim)) return false;
  }
  return true;
}

}  // namespace

Tensor new_out(const AttentionArgs& args) {
  if (args.head_dim_v() == args.head_dim()) return empty_like(args.q);
  const Sizes q = args.q.sizes();
  std::vector<int64_t> sizes(q.begin(), q.end());
  sizes.back() = args.head_dim_v();
  return empty(sizes, args.q, args.q.scalar_type());
}

Tensor new_lse(const AttentionArgs& args) {
  const ScalarType dtype = accumulator_type(args.q);
  if (args.packed()) return empty({args.heads(), args.q.size(0)}, args.q, dtype);
  return empty({args.q.size(0), args.heads(), args.q.size(1)}, args.q, dtype);
}

Tensor zeros_like(const Tensor& x) {
  const Tensor result = empty_like(x);
  fill_(result, 0);
  return result;
}

Tensor as_promised(const Tensor& x, const Tensor& like) {
  const bool same_type = x.scalar_type() == like.scalar_type();
  if (same_type && same_strides(x, like)) return x;
  const Tensor result = empty_like(like);
  if (same_type && same_strides(x, result)) return x;
  copy_(result, x);
  return result;
}

ForwardResult nothing_visible(const AttentionArgs& args) {
  const ForwardResult result{new_out(args), new_lse(args)};
  fill_(result.first, 0);
  fill_(result.second, std::numeric_limits<double>::infinity());
  return result;
}

Gradients no_gradients(const AttentionArgs& args) {
  return {zeros_like(args.q), zeros_like(args.k), zeros_like(args.v), std::nullopt, std::nullopt};
}

Gradients promised_gradients(const AttentionArgs& args, const Tensor& dq, const Tensor& dk,
                             const Tensor& dv) {
  return {as_promised(dq, args.q), as_promised(dk, args.k), as_promised(dv, args.v), std::nullopt,
          std::nullopt};
}

ScalarType accumulator_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor four_dims(Tensor x) {
  while (x.dim() < 4) x = unsqueeze(x, 0);
  return x;
}

Tensor narrow_broadcast(const Tensor& x, int64_t dim, int64_t begin, int64_t length) {
  return x.size(dim) == 1 ? x : narrow(x, dim, begin, length);
}

}  // namespace anyflash
