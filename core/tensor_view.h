// A tensor as the core sees it: plain data, which torch of any version can be written down as. All
// structs of the C interface are made of these; ctypes mirrors them (anyflash/_records.py).
#pragma once

#include <cstdint>

#include "kernels/launch.h"

namespace anyflash {

constexpr int32_t kMaxRank = 8;

// Dtype's numbers, and what index tensors and messages need besides.
enum class ElementType : int32_t {
  other = 0,
  fp16 = int32_t(Dtype::fp16),
  bf16 = int32_t(Dtype::bf16),
  fp32 = int32_t(Dtype::fp32),
  fp64 = int32_t(Dtype::fp64),
  boolean = 16,
  int32,
  int64,
  uint8,
  int8,
  int16,
  complex64,
  complex128,
  float8_e4m3fn,
  float8_e5m2,
};

constexpr bool is_floating(ElementType type) {
  return type == ElementType::fp16 || type == ElementType::bf16 || type == ElementType::fp32 ||
         type == ElementType::fp64;
}

constexpr int64_t bytes_of(ElementType type) {
  switch (type) {
    case ElementType::boolean:
    case ElementType::uint8:
    case ElementType::int8:
    case ElementType::float8_e4m3fn:
    case ElementType::float8_e5m2:
      return 1;
    case ElementType::fp16:
    case ElementType::bf16:
    case ElementType::int16:
      return 2;
    case ElementType::fp32:
    case ElementType::int32:
      return 4;
    case ElementType::complex128:
      return 16;
    default:
      return 8;
  }
}

// storage_bytes of a tensor whose memory cannot be looked at (meta, fake, under a transform): it is
// checked, and never goes to a kernel.
constexpr int64_t kNoMemory = INT64_MIN;

struct TensorView {
  void* data = nullptr;
  // The values on the host, for those that checks read: data on the CPU; elsewhere null, or a
  // contiguous copy.
  const void* host = nullptr;
  int64_t storage_bytes = 0;  // from data to the end of its memory
  int32_t rank = -1;          // -1: no tensor was given
  ElementType dtype = ElementType::other;
  Device device = Device::cpu;
  int32_t device_index = -1;
  int64_t sizes[kMaxRank] = {};
  int64_t strides[kMaxRank] = {};  // in elements

  bool given() const { return rank >= 0; }
  int64_t size(int64_t dim) const { return sizes[dim < 0 ? dim + rank : dim]; }
  int64_t stride(int64_t dim) const { return strides[dim < 0 ? dim + rank : dim]; }
  int64_t numel() const {
    int64_t count = 1;
    for (int32_t i = 0; i < rank && i < kMaxRank; ++i) count *= sizes[i];
    return count;
  }
};

// Whether both lie in the same memory space.
inline bool same_device(const TensorView& a, const TensorView& b) {
  return a.device == b.device && a.device_index == b.device_index;
}

}  // namespace anyflash
