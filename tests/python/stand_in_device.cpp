// A device for tests that is neither "cpu" nor "cuda": PyTorch's key PrivateUse1 over host memory.
//
// The addresses that its tensors give are not those of their memory: who reads or writes there dies
// of SIGSEGV. Only what is in this file knows where the memory is. An operator without a kernel
// here runs on the CPU by PyTorch's own fallback.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_cpu_dispatch.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <ATen/record_function.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>

namespace {

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kType, 0);

// No process has memory that far up.
constexpr uintptr_t kDistance = uintptr_t{1} << 54;

void* device_address(void* host) {
  return host ? reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(host) + kDistance) : host;
}

void* host_address(void* device) {
  return device ? reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(device) - kDistance) : device;
}

struct StandInAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* host = bytes == 0 ? nullptr : c10::alloc_cpu(bytes);
    return {device_address(host), host, &c10::free_cpu, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(host_address(to), host_address(const_cast<void*>(from)), bytes);
  }
};

StandInAllocator allocator;
REGISTER_ALLOCATOR(kType, &allocator)

struct StandInGuard final : c10::impl::NoOpDeviceGuardImpl<kType> {
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }

 private:
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, StandInGuard)

struct StandInHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  // Random numbers are the CPU's.
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
};

// How often the host had to wait for a value of the device.
std::atomic<int64_t> host_reads{0};
// What the fallback moves to the CPU and back is work of the device.
thread_local int fallback_depth = 0;

// The same memory as a tensor of the CPU; others as they are.
at::Tensor on_host(const at::Tensor& x) {
  if (x.device().type() != kType) return x;
  void* data = x.numel() == 0 ? nullptr : host_address(x.mutable_data_ptr());
  return at::from_blob(data, x.sizes(), x.strides(), x.options().device(at::kCPU));
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator,
                                   c10::DispatchKeySet(at::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator,
                                           c10::DispatchKeySet(at::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef size,
                          std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  const size_t bytes = (impl->storage_offset() + impl->numel()) * self.itemsize();
  const c10::Storage& storage = impl->unsafe_storage();
  if (bytes > storage.nbytes()) {
    c10::DataPtr larger = allocator.allocate(bytes);
    if (storage.nbytes() > 0)
      allocator.copy_data(larger.mutable_get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(bytes);
  }
  return self;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& destination, bool) {
  const bool reads = self.device().type() == kType && destination.device().type() != kType;
  if (reads && fallback_depth == 0) ++host_reads;
  on_host(destination).copy_(on_host(self));
  return destination;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& destination) {
  if (destination.sizes() != self.sizes()) destination.resize_(self.sizes());
  return copy_from(self, destination, false);
}

at::Scalar local_scalar(const at::Tensor& self) {
  if (fallback_depth == 0) ++host_reads;
  return at::_local_scalar_dense(on_host(self));
}

at::Tensor& set_source(at::Tensor& self, at::Storage source) {
  const int64_t count = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return at::cpu::set_(self, std::move(source), 0, {count}, {1});
}

void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  struct Depth {
    Depth() { ++fallback_depth; }
    ~Depth() { --fallback_depth; }
  } depth;
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", [](const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride,
                          std::optional<int64_t> offset) {
    return at::cpu::as_strided(self, size, stride, offset);
  });
  m.impl("view",
         [](const at::Tensor& self, c10::IntArrayRef size) { return at::cpu::view(self, size); });
  m.impl("_reshape_alias",
         [](const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
           return at::cpu::_reshape_alias(self, size, stride);
         });
  m.impl("unfold", [](const at::Tensor& self, int64_t dim, int64_t size, int64_t step) {
    return at::cpu::unfold(self, dim, size, step);
  });
  m.impl("set_.source_Storage_storage_offset",
         [](at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size,
            c10::IntArrayRef stride) -> at::Tensor& {
           return at::cpu::set_(self, std::move(source), offset, size, stride);
         });
  m.impl("set_.source_Storage", &set_source);
  m.impl("resize_", &resize_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fall_back>());
}

// What PyTorch's autocast does on a device: products in the lower precision, and all else as it is.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
}

const bool has_hooks = [] {
  at::RegisterPrivateUse1HooksInterface(new StandInHooks);
  return true;
}();

// How often PyTorch's public attention was called, by whomever, on whatever device.
std::atomic<int64_t> sdpa_calls{0};

const bool has_observer = [] {
  const auto observe = [](const at::RecordFunction& call) -> std::unique_ptr<at::ObserverContext> {
    if (std::strcmp(call.name(), "aten::scaled_dot_product_attention") == 0) ++sdpa_calls;
    return nullptr;
  };
  at::addGlobalCallback(at::RecordFunctionCallback(observe).scopes({at::RecordScope::FUNCTION}));
  return true;
}();

}  // namespace

extern "C" int64_t stand_in_host_reads() { return host_reads; }
extern "C" int64_t stand_in_sdpa_calls() { return sdpa_calls; }
