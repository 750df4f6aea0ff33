#include "routes/far_rows.h"

#include <limits>

namespace anyflash {

namespace {

// From here on the rounding of a log-sum-exp (2^-24 of it, in fp64 2^-53) is no longer small beside
// the logarithm of a sum.
constexpr double kFar = 0x1p14, kFarDouble = 0x1p43;

}  // namespace

OptionalTensor far_rows(const Tensor& lse) {
  const double limit = lse.scalar_type() == ScalarType::Double ? kFarDouble : kFar;
  const Tensor size = aten<Tensor>("aten::abs", "", lse);
  const Tensor far = aten<Tensor>(
      "aten::bitwise_and", "Tensor", aten<Tensor>("aten::ge", "Tensor", size, scalar(limit)),
      aten<Tensor>("aten::lt", "Tensor", size, scalar(std::numeric_limits<double>::infinity())));
  if (far.is_cpu()) {
    const Tensor some = aten<Tensor>("aten::any", "", far);
    if (!*static_cast<const bool*>(some.const_data_ptr())) return std::nullopt;
  }
  return far;
}

}  // namespace anyflash
