#include "stable/view.h"

#include <array>
#include <new>
#include <stdexcept>

#include "core/late_symbol.h"

namespace anyflash {
namespace {

// ElementType by libtorch's number of a dtype.
struct ElementTypes {
  std::array<ElementType, 64> types{};

  ElementTypes() {
    const auto set = [this](int32_t code, ElementType type) {
      if (code >= 0 && code < static_cast<int32_t>(types.size())) types[code] = type;
    };
    set(aoti_torch_dtype_float16(), ElementType::fp16);
    set(aoti_torch_dtype_bfloat16(), ElementType::bf16);
    set(aoti_torch_dtype_float32(), ElementType::fp32);
    set(aoti_torch_dtype_float64(), ElementType::fp64);
    set(aoti_torch_dtype_bool(), ElementType::boolean);
    set(aoti_torch_dtype_int32(), ElementType::int32);
    set(aoti_torch_dtype_int64(), ElementType::int64);
    set(aoti_torch_dtype_uint8(), ElementType::uint8);
    set(aoti_torch_dtype_int8(), ElementType::int8);
    set(aoti_torch_dtype_int16(), ElementType::int16);
    set(aoti_torch_dtype_complex64(), ElementType::complex64);
    set(aoti_torch_dtype_complex128(), ElementType::complex128);
    set(aoti_torch_dtype_float8_e4m3fn(), ElementType::float8_e4m3fn);
    set(aoti_torch_dtype_float8_e5m2(), ElementType::float8_e5m2);
  }
};

ElementType element_type(const Tensor& tensor) {
  static const ElementTypes table;
  int32_t code = 0;
  check_code(aoti_torch_get_dtype(tensor.get(), &code), "dtype");
  return code >= 0 && code < static_cast<int32_t>(table.types.size()) ? table.types[code]
                                                                      : ElementType::other;
}

// A torch for HIP calls its devices cuda too. NVIDIA's have a driver in the process.
Device nvidia_or_hip() {
  static LateSymbol<int(int*)> driver("cuDriverGetVersion", "libcuda.so.1");
  return driver.find() != nullptr ? Device::cuda : Device::hip;
}

Device device_of(int32_t type) {
  static const int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda(),
                       mps = aoti_torch_device_type_mps(), xpu = aoti_torch_device_type_xpu();
  if (type == cpu) return Device::cpu;
  if (type == cuda) return nvidia_or_hip();
  return type == mps ? Device::mps : type == xpu ? Device::xpu : Device::other;
}

// Whether memory of such a device goes to kernels.
bool has_kernels(Device device) { return device == Device::cpu || device == Device::cuda; }

TensorView view_without_data(const Tensor& tensor) {
  TensorView view;
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  view.rank = static_cast<int32_t>(sizes.size());
  for (int32_t i = 0; i < view.rank && i < kMaxRank; ++i) {
    view.sizes[i] = sizes[i];
    view.strides[i] = strides[i];
  }
  view.dtype = element_type(tensor);
  int32_t type = 0;
  check_code(aoti_torch_get_device_type(tensor.get(), &type), "device type");
  view.device = device_of(type);
  if (view.device != Device::cpu) {
    check_code(aoti_torch_get_device_index(tensor.get(), &view.device_index), "device index");
  }
  if (!has_kernels(view.device)) {
    view.storage_bytes = kNoMemory;
    return view;
  }
  int64_t bytes = 0, offset = 0;
  check_code(aoti_torch_get_storage_size(tensor.get(), &bytes), "storage size");
  check_code(aoti_torch_get_storage_offset(tensor.get(), &offset), "storage offset");
  view.storage_bytes = bytes - offset * bytes_of(view.dtype);
  return view;
}

}  // namespace

TensorView view_of(const Tensor& tensor) {
  TensorView view = view_without_data(tensor);
  if (!has_kernels(view.device)) return view;
  const void* data = nullptr;
  check_code(torch_get_const_data_ptr(tensor.get(), &data), "data pointer");
  view.data = const_cast<void*>(data);
  if (view.device == Device::cpu) view.host = data;
  return view;
}

TensorView view_of(const OptionalTensor& tensor) {
  return tensor ? view_of(*tensor) : TensorView{};
}

TensorView view_to_write(const Tensor& tensor) {
  TensorView view = view_without_data(tensor);
  if (!has_kernels(view.device)) return view;
  check_code(torch_get_mutable_data_ptr(tensor.get(), &view.data), "data pointer");
  if (view.device == Device::cpu) view.host = view.data;
  return view;
}

TensorView view_with_values(const OptionalTensor& tensor, std::vector<Tensor>& host_copies) {
  if (!tensor) return {};
  TensorView view = view_of(*tensor);
  if (view.device != Device::cuda || view.dtype != ElementType::int32 || view.rank < 1 ||
      view.rank > 2 || !anyflash_checks_values()) {
    return view;
  }
  const std::array<int64_t, 2> strides{view.rank == 2 ? view.sizes[1] : 1, 1};
  AtenTensorHandle copy = nullptr;
  check_code(
      aoti_torch_empty_strided(view.rank, view.sizes, strides.data(), aoti_torch_dtype_int32(),
                               aoti_torch_device_type_cpu(), -1, &copy),
      "empty_strided");
  host_copies.emplace_back(copy);
  check_code(aoti_torch_copy_(copy, tensor->get(), 0), "copy_");
  view.host = host_copies.back().const_data_ptr();
  return view;
}

Tensor tensor_like(const Tensor& base, const TensorView& view) {
  // As the core saw it: memory without kernels has no address there.
  const auto* begin = static_cast<const char*>(view_of(base).data);
  const int64_t offset = (static_cast<const char*>(view.data) - begin) / bytes_of(view.dtype);
  return anyflash::view(base, {view.sizes, static_cast<size_t>(view.rank)},
                        {view.strides, static_cast<size_t>(view.rank)}, offset);
}

Caller caller(int64_t backend) { return {backend, torch_version()}; }

void check_status(Status status) {
  switch (status) {
    case Status::ok:
      return;
    case Status::value_error:
      throw std::invalid_argument(anyflash_text());
    case Status::no_memory:
      throw std::bad_alloc();
    default:
      throw std::runtime_error(anyflash_text());
  }
}

}  // namespace anyflash
