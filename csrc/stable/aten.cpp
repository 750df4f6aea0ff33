#include "stable/aten.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/device.h>

#include <array>

namespace anyflash {

namespace {

constexpr int64_t kMaxDims = 8;

// Sizes and strides of a view under construction.
struct Geometry {
  int64_t dims = 0;
  std::array<int64_t, kMaxDims> sizes{};
  std::array<int64_t, kMaxDims> strides{};

  Geometry() = default;
  explicit Geometry(const Tensor& x) {
    const Sizes x_sizes = x.sizes();
    const Sizes x_strides = x.strides();
    dims = static_cast<int64_t>(x_sizes.size());
    AF_CHECK(dims <= kMaxDims, "anyflash: expected at most ", kMaxDims, " dimensions, got ", dims);
    std::copy(x_sizes.begin(), x_sizes.end(), sizes.begin());
    std::copy(x_strides.begin(), x_strides.end(), strides.begin());
  }

  void insert(int64_t dim, int64_t size, int64_t stride) {
    AF_CHECK(dims < kMaxDims, "anyflash: expected at most ", kMaxDims, " dimensions, got one more");
    std::copy_backward(sizes.begin() + dim, sizes.begin() + dims, sizes.begin() + dims + 1);
    std::copy_backward(strides.begin() + dim, strides.begin() + dims, strides.begin() + dims + 1);
    sizes[dim] = size;
    strides[dim] = stride;
    ++dims;
  }
  void erase(int64_t dim) {
    std::copy(sizes.begin() + dim + 1, sizes.begin() + dims, sizes.begin() + dim);
    std::copy(strides.begin() + dim + 1, strides.begin() + dims, strides.begin() + dim);
    --dims;
  }
  Tensor of(const Tensor& x, int64_t offset = 0) const {
    AtenTensorHandle result = nullptr;
    check_code(aoti_torch__reinterpret_tensor(x.get(), dims, sizes.data(), strides.data(), offset,
                                              &result),
               "view");
    return Tensor(result);
  }
};

int64_t wrap(int64_t dim, int64_t dims) { return dim < 0 ? dim + dims : dim; }

int32_t dtype_code(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

bool is_integer(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  return dtype == ScalarType::Int || dtype == ScalarType::Long || dtype == ScalarType::Bool;
}

// The device of `x` as the shims take it.
struct DeviceCode {
  int32_t type = 0;
  int32_t index = 0;
  explicit DeviceCode(const Tensor& x) {
    check_code(aoti_torch_get_device_type(x.get(), &type), "device type");
    check_code(aoti_torch_get_device_index(x.get(), &index), "device index");
  }
};

}  // namespace

int torch_version() {
  static const int version = [] {
    const uint64_t code = aoti_torch_abi_version();
    return static_cast<int>((code >> 56) * 100 + ((code >> 48) & 0xff));
  }();
  return version;
}

Tensor view(const Tensor& x, Sizes sizes, Sizes strides, int64_t offset) {
  AtenTensorHandle result = nullptr;
  check_code(aoti_torch__reinterpret_tensor(x.get(), static_cast<int64_t>(sizes.size()),
                                            sizes.data(), strides.data(), offset, &result),
             "view");
  return Tensor(result);
}

Tensor transpose(const Tensor& x, int64_t dim0, int64_t dim1) {
  Geometry g(x);
  dim0 = wrap(dim0, g.dims);
  dim1 = wrap(dim1, g.dims);
  std::swap(g.sizes[dim0], g.sizes[dim1]);
  std::swap(g.strides[dim0], g.strides[dim1]);
  return g.of(x);
}

Tensor narrow(const Tensor& x, int64_t dim, int64_t start, int64_t length) {
  Geometry g(x);
  dim = wrap(dim, g.dims);
  g.sizes[dim] = length;
  return g.of(x, start * g.strides[dim]);
}

Tensor select(const Tensor& x, int64_t dim, int64_t index) {
  Geometry g(x);
  dim = wrap(dim, g.dims);
  const int64_t offset = index * g.strides[dim];
  g.erase(dim);
  return g.of(x, offset);
}

Tensor unsqueeze(const Tensor& x, int64_t dim) {
  Geometry g(x);
  dim = wrap(dim, g.dims + 1);
  g.insert(dim, 1, dim < g.dims ? g.sizes[dim] * g.strides[dim] : 1);
  return g.of(x);
}

Tensor expand(const Tensor& x, Sizes sizes) {
  Geometry g(x);
  for (int64_t dim = 0; dim < g.dims; ++dim) {
    if (g.sizes[dim] == sizes[dim]) continue;
    g.sizes[dim] = sizes[dim];
    g.strides[dim] = 0;
  }
  return g.of(x);
}

Tensor split_dim(const Tensor& x, int64_t dim, int64_t inner) {
  Geometry g(x);
  dim = wrap(dim, g.dims);
  const int64_t stride = g.strides[dim];
  g.sizes[dim] /= inner;
  g.strides[dim] = stride * inner;
  g.insert(dim + 1, inner, stride);
  return g.of(x);
}

Tensor empty(Sizes sizes, const Tensor& like, ScalarType dtype) {
  std::array<int64_t, kMaxDims> strides{};
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= std::max<int64_t>(sizes[dim], 1);
  }
  const DeviceCode device(like);
  AtenTensorHandle result = nullptr;
  check_code(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               dtype_code(dtype), device.type, device.index, &result),
      "empty");
  return Tensor(result);
}

Tensor empty_like(const Tensor& x) {
  return aten<Tensor>("aten::empty_like", "", x, std::nullopt, std::nullopt, std::nullopt,
                      std::nullopt, std::nullopt);
}

Tensor full(Sizes sizes, double value, const Tensor& like, ScalarType dtype) {
  Tensor result = empty(sizes, like, dtype);
  fill_(result, value);
  return result;
}

// aten::arange takes Scalars; the row numbers of the lower triangle of an (end, 1) matrix are the
// same.
Tensor arange(int64_t end, const Tensor& like) {
  Tensor rows_and_columns =
      aten<Tensor>("aten::tril_indices", "", end, 1, 0, std::optional<ScalarType>(ScalarType::Long),
                   std::nullopt, std::optional<torch::stable::Device>(like.device()), std::nullopt);
  return select(rows_and_columns, 0, 0);
}

Tensor undefined() {
  AtenTensorHandle result = nullptr;
  check_code(aoti_torch_new_uninitialized_tensor(&result), "undefined tensor");
  return Tensor(result);
}

Tensor scalar(double value) {
  AtenTensorHandle result = nullptr;
  check_code(aoti_torch_scalar_to_tensor_float64(value, &result), "scalar");
  return Tensor(result);
}

Tensor scalar(int64_t value) {
  AtenTensorHandle result = nullptr;
  check_code(aoti_torch_scalar_to_tensor_int64(value, &result), "scalar");
  return Tensor(result);
}

Tensor contiguous(const Tensor& x) {
  if (x.is_contiguous()) return x;
  return aten<Tensor>("aten::contiguous", "", x, torch::headeronly::MemoryFormat::Contiguous);
}

Tensor reshape(const Tensor& x, Sizes sizes) { return aten<Tensor>("aten::reshape", "", x, sizes); }

Tensor to_dtype(const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() == dtype) return x;
  return aten<Tensor>("aten::to", "dtype", x, dtype, false, false, std::nullopt);
}

void copy_(const Tensor& destination, const Tensor& source) {
  check_code(aoti_torch_copy_(destination.get(), source.get(), /*non_blocking=*/0), "copy_");
}

void fill_(const Tensor& x, double value) {
  check_code(aoti_torch_aten_fill__Scalar(x.get(), value), "fill_");
}

// The shim's alpha is a double, which PyTorch refuses for integers: those go through fp64, exact up
// to 2^53.
Tensor add(const Tensor& a, const Tensor& b, double alpha) {
  if (is_integer(a) && is_integer(b)) {
    return to_dtype(add(to_dtype(a, ScalarType::Double), b, alpha), ScalarType::Long);
  }
  AtenTensorHandle result = nullptr;
  check_code(aoti_torch_aten_subtract_Tensor(a.get(), b.get(), -alpha, &result), "add");
  return Tensor(result);
}

Tensor sub(const Tensor& a, const Tensor& b) { return add(a, b, -1); }

Tensor mul(const Tensor& a, const Tensor& b) { return aten<Tensor>("aten::mul", "Tensor", a, b); }

Tensor mul(const Tensor& a, double factor) { return mul(a, scalar(factor)); }

Tensor sum(const Tensor& x, std::vector<int64_t> dims, bool keepdim) {
  return aten<Tensor>("aten::sum", "dim_IntList", x, std::optional<std::vector<int64_t>>(dims),
                      keepdim, std::nullopt);
}

Tensor amax(const Tensor& x, int64_t dim, bool keepdim) {
  return aten<Tensor>("aten::amax", "", x, std::vector<int64_t>{dim}, keepdim);
}

Tensor bmm(const Tensor& a, const Tensor& b) { return aten<Tensor>("aten::bmm", "", a, b); }

}  // namespace anyflash
