#include "core/text.h"

#include <algorithm>

#include "core/names.h"

namespace anyflash {

std::string shape_text(const TensorView& tensor) {
  std::ostringstream stream;
  const int32_t rank = std::min(tensor.rank, kMaxRank);
  stream << "(";
  for (int32_t i = 0; i < rank; ++i) stream << (i == 0 ? "" : ", ") << tensor.sizes[i];
  stream << (tensor.rank > rank ? ", ...)" : rank == 1 ? ",)" : ")");
  return stream.str();
}

const char* dtype_name(ElementType type) {
  constexpr Name<ElementType> kOthers[] = {{"bool", ElementType::boolean},
                                           {"int32", ElementType::int32},
                                           {"int64", ElementType::int64},
                                           {"uint8", ElementType::uint8},
                                           {"int8", ElementType::int8},
                                           {"int16", ElementType::int16},
                                           {"complex64", ElementType::complex64},
                                           {"complex128", ElementType::complex128},
                                           {"float8_e4m3fn", ElementType::float8_e4m3fn},
                                           {"float8_e5m2", ElementType::float8_e5m2}};
  return name_of(static_cast<Dtype>(type), kDtypeNames, name_of(type, kOthers, "another dtype"));
}

const char* dtype_text(const TensorView& tensor) { return dtype_name(tensor.dtype); }

std::string device_text(const TensorView& tensor) {
  if (tensor.device == Device::cpu) return "cpu";
  if (tensor.device == Device::other) return "another device";
  return text(kDeviceNames[static_cast<int32_t>(tensor.device)], ":", tensor.device_index);
}

}  // namespace anyflash
