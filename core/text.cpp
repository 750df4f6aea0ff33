#include "core/text.h"

#include <algorithm>

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
  switch (type) {
    case ElementType::fp16:
      return "fp16";
    case ElementType::bf16:
      return "bf16";
    case ElementType::fp32:
      return "fp32";
    case ElementType::fp64:
      return "fp64";
    case ElementType::boolean:
      return "bool";
    case ElementType::int32:
      return "int32";
    case ElementType::int64:
      return "int64";
    case ElementType::uint8:
      return "uint8";
    case ElementType::int8:
      return "int8";
    case ElementType::int16:
      return "int16";
    case ElementType::complex64:
      return "complex64";
    case ElementType::complex128:
      return "complex128";
    case ElementType::float8_e4m3fn:
      return "float8_e4m3fn";
    case ElementType::float8_e5m2:
      return "float8_e5m2";
    case ElementType::other:
      break;
  }
  return "another dtype";
}

const char* dtype_text(const TensorView& tensor) { return dtype_name(tensor.dtype); }

std::string device_text(const TensorView& tensor) {
  if (tensor.device == Device::cpu) return "cpu";
  if (tensor.device == Device::other) return "another device";
  return text(kDeviceNames[static_cast<int32_t>(tensor.device)], ":", tensor.device_index);
}

}  // namespace anyflash
