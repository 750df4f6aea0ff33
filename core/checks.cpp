#include "core/checks.h"

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "core/names.h"

namespace anyflash {
namespace {

// One past the last element, in elements from the first. Strides of torch tensors are not negative.
int64_t extent_of(const TensorView& tensor) {
  int64_t last = 0;
  for (int32_t i = 0; i < tensor.rank && i < kMaxRank; ++i) {
    last += (tensor.sizes[i] - 1) * tensor.strides[i];
  }
  return last + 1;
}

struct Dim {
  int64_t size, stride;
};

// The dimensions with more than one element, the widest stride first.
struct Dims {
  explicit Dims(const TensorView& tensor) {
    for (int32_t i = 0; i < tensor.rank && i < kMaxRank; ++i) {
      if (tensor.sizes[i] > 1) dims[count++] = {tensor.sizes[i], tensor.strides[i]};
    }
    std::sort(dims.begin(), dims.begin() + count,
              [](const Dim& a, const Dim& b) { return a.stride > b.stride; });
  }
  std::array<Dim, kMaxRank> dims{};
  int32_t count = 0;
};

// Whether each stride steps over all that lies inside of it, which keeps elements apart.
bool is_nested(const Dims& dims) {
  int64_t inner = 1;
  for (int32_t i = dims.count - 1; i >= 0; --i) {
    if (dims.dims[i].stride < inner) return false;
    inner = dims.dims[i].stride * (dims.dims[i].size - 1) + inner;
  }
  return true;
}

// Whether an element of a nested tensor lies in [begin, end), counted in elements from its first.
bool touches(const Dims& dims, int32_t from, int64_t begin, int64_t end) {
  if (end <= 0) return false;
  if (from == dims.count) return begin <= 0;
  const auto [size, stride] = dims.dims[from];
  // At most two indices of this dimension come near: the one at or before `begin`, and the next.
  const int64_t first = std::clamp<int64_t>(begin / stride, 0, size - 1);
  for (int64_t i = first; i < std::min(first + 2, size); ++i) {
    if (touches(dims, from + 1, begin - i * stride, end - i * stride)) return true;
  }
  return false;
}

// The dimensions of both tensors as one, as far as their strides are the same; in each the longer
// of the two sizes.
std::optional<Dims> common_dims(const TensorView& a, const TensorView& b) {
  if (a.rank != b.rank || a.rank > kMaxRank) return std::nullopt;
  TensorView both = a;
  for (int32_t i = 0; i < a.rank; ++i) {
    if (a.sizes[i] > 1 && b.sizes[i] > 1 && a.strides[i] != b.strides[i]) return std::nullopt;
    if (b.sizes[i] <= a.sizes[i]) continue;
    both.sizes[i] = b.sizes[i];
    both.strides[i] = b.strides[i];
  }
  return Dims(both);
}

// Whether two tensors of the same strides share an element, `offset` being that of b's first from
// a's. Their common dimensions are nested.
bool shares(const TensorView& a, const TensorView& b, int64_t offset) {
  struct Step {
    int64_t stride, lowest, highest;  // index in a minus index in b
  };
  std::vector<Step> steps;
  for (int32_t i = 0; i < a.rank; ++i) {
    if (a.sizes[i] == 1 && b.sizes[i] == 1) continue;
    const int64_t stride = a.sizes[i] > 1 ? a.strides[i] : b.strides[i];
    steps.push_back({stride, 1 - b.sizes[i], a.sizes[i] - 1});
  }
  std::sort(steps.begin(), steps.end(),
            [](const Step& x, const Step& y) { return x.stride > y.stride; });
  const auto reaches = [&](const auto& self, size_t from, int64_t rest) -> bool {
    if (from == steps.size()) return rest == 0;
    const auto [stride, lowest, highest] = steps[from];
    const int64_t below = rest >= 0 ? rest / stride : -((stride - 1 - rest) / stride);
    for (int64_t i = below; i <= below + 1; ++i) {
      if (i >= lowest && i <= highest && self(self, from + 1, rest - i * stride)) return true;
    }
    return false;
  };
  return reaches(reaches, 0, offset);
}

// Calls visit(begin, length) for every run of neighbouring elements until it returns true; false
// where there are too many to look at.
template <typename Visit>
bool any_run(Dims dims, Visit visit) {
  constexpr int64_t kMostRuns = 1 << 12;
  while (dims.count > 0 && dims.dims[dims.count - 1].stride == 0) --dims.count;  // expanded
  const bool contiguous = dims.count > 0 && dims.dims[dims.count - 1].stride == 1;
  const int32_t outer = dims.count - (contiguous ? 1 : 0);
  const int64_t length = contiguous ? dims.dims[outer].size : 1;
  int64_t runs = 1;
  for (int32_t i = 0; i < outer; ++i) runs *= dims.dims[i].size;
  if (runs > kMostRuns) return false;
  for (int64_t run = 0; run < runs; ++run) {
    int64_t begin = 0, rest = run;
    for (int32_t i = outer - 1; i >= 0; --i) {
      begin += rest % dims.dims[i].size * dims.dims[i].stride;
      rest /= dims.dims[i].size;
    }
    if (visit(begin, length)) return true;
  }
  return false;
}

}  // namespace

bool has_shape(const TensorView& tensor, std::initializer_list<int64_t> expected) {
  if (tensor.rank != static_cast<int32_t>(expected.size())) return false;
  const int64_t* size = tensor.sizes;
  for (const int64_t want : expected) {
    if (*size++ != want) return false;
  }
  return true;
}

void check_allocated(const TensorView& tensor, const char* name) {
  if (!tensor.given() || tensor.numel() == 0 || tensor.storage_bytes == kNoMemory) return;
  AF_CHECK(
      tensor.data != nullptr && extent_of(tensor) * bytes_of(tensor.dtype) <= tensor.storage_bytes,
      name, ": expected allocated memory, got a tensor of shape ", shape_text(tensor),
      " whose storage has ", std::max<int64_t>(tensor.storage_bytes, 0),
      " bytes for it (freed, or not materialised)");
}

void check_no_self_overlap(const TensorView& tensor, const char* name) {
  if (tensor.numel() == 0) return;
  AF_CHECK(is_nested(Dims(tensor)), name,
           ": is written, expected memory of its own for every element, got shape ",
           shape_text(tensor), " that is expanded or overlaps itself");
}

void check_no_overlap(const TensorView& written, const char* written_name, const TensorView& read,
                      const char* read_name) {
  if (!read.given() || read.numel() == 0 || written.numel() == 0) return;
  if (!same_device(written, read)) return;
  if (written.storage_bytes == kNoMemory || read.storage_bytes == kNoMemory) return;
  const auto begin = [](const TensorView& x) { return reinterpret_cast<uintptr_t>(x.data); };
  const auto end = [&](const TensorView& x) {
    return begin(x) + static_cast<uintptr_t>(extent_of(x) * bytes_of(x.dtype));
  };
  if (begin(read) >= end(written) || begin(written) >= end(read)) return;
  const int64_t width = bytes_of(written.dtype);
  const auto offset = static_cast<int64_t>(begin(read) - begin(written));
  // Two dtypes in one memory are left alone: nobody cuts a cache and what goes in from one buffer
  // so.
  if (bytes_of(read.dtype) != width || offset % width != 0) return;
  const Dims into(written), from(read);
  const std::optional<Dims> common = common_dims(written, read);
  const bool overlaps = common && is_nested(*common)
                            ? shares(written, read, offset / width)
                            : any_run(from, [&](int64_t at, int64_t length) {
                                const int64_t first = offset / width + at;
                                return touches(into, 0, first, first + length);
                              });
  AF_CHECK(!overlaps, read_name, ": expected memory of its own, got a view into ", written_name,
           ", which is written while ", read_name, " is read");
}

void check_same_device(const TensorView& reference, const char* reference_name,
                       const TensorView& tensor, const char* name) {
  const bool same = same_device(reference, tensor);
  AF_CHECK(same || reference.device != Device::other, name, ": expected the device of ",
           reference_name, ", got ", device_text(tensor));
  const char* kind = reference.device == Device::cuda
                         ? "CUDA"
                         : name_of(reference.device, kDeviceNames, "one device");
  AF_CHECK(same, name, " must be on ", kind, ": expected ", device_text(reference), " like ",
           reference_name, ", got ", device_text(tensor));
}

void check_last_dim_contiguous(const TensorView& tensor, const char* name) {
  AF_CHECK(tensor.stride(-1) == 1 || tensor.size(-1) <= 1 || tensor.numel() == 0,
           "Input tensor must have contiguous last dimension, got ", name, " with stride ",
           tensor.stride(-1));
}

void check_index_vector(const TensorView& tensor, const char* name, const TensorView& q,
                        int64_t size, const char* size_text) {
  AF_CHECK(tensor.dtype == ElementType::int32, name, " must have dtype int32, got ",
           dtype_text(tensor));
  check_same_device(q, "q", tensor, name);
  const bool contiguous = tensor.rank != 1 || tensor.stride(0) == 1 || tensor.size(0) <= 1;
  AF_CHECK(contiguous, name, " must be contiguous, got shape ", shape_text(tensor), " with stride ",
           tensor.stride(0));
  AF_CHECK(has_shape(tensor, {size}), name, " must have shape ", size_text, ": expected (", size,
           ",), got ", shape_text(tensor));
  check_allocated(tensor, name);
}

void check_not_negative(const Integers& values, const char* name) {
  for (int64_t i = 0; i < values.size(); ++i) {
    AF_CHECK(values[i] >= 0, name, ": expected 0 or more, got ", values[i], " for sequence ", i);
  }
}

void check_cumulative(const Integers& cu, const char* name, const TensorView* storage,
                      const char* storage_name, int64_t longest, const char* longest_name) {
  AF_CHECK(cu[0] == 0, name, ": expected to start at 0, got ", cu[0]);
  const int64_t batch = cu.size() - 1;
  for (int64_t i = 0; i < batch; ++i) {
    AF_CHECK(cu[i + 1] >= cu[i], name, ": must not decrease, got ", cu[i], " and then ", cu[i + 1],
             " at index ", i + 1);
    AF_CHECK(cu[i + 1] - cu[i] <= longest, longest_name, ": expected at least ", cu[i + 1] - cu[i],
             ", the length of sequence ", i, " in ", name, ", got ", longest);
  }
  AF_CHECK(storage == nullptr || cu[batch] <= storage->size(0), name, ": ends at ", cu[batch],
           ", but ", storage_name, " has ", storage->size(0), " rows");
}

}  // namespace anyflash
