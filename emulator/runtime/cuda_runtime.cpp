// The part of the CUDA runtime that our objects of nvcc link with, on top of the emulator: kernels
// are looked up by the names under which nvcc registers their host stubs, and run at once.
//
// In place of libcudart; add functions here when launchers come to need them.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <vector>

#include "emulator/runtime/emulator.h"

namespace {

struct DeviceFunction {
  const char* name;  // mangled
  uint32_t dynamic_shared_limit;
};

constexpr uint32_t kDefaultSharedBytes = 48 * 1024;  // more needs cudaFuncSetAttribute

std::map<const void*, DeviceFunction>& device_functions() {
  static std::map<const void*, DeviceFunction> by_stub;
  return by_stub;
}

struct CallConfiguration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};
CallConfiguration configuration;  // between <<<>>> and the stub

emu::Dim3 to_emu(dim3 size) { return {size.x, size.y, size.z}; }

uint32_t static_shared_bytes(const DeviceFunction& function) {
  const emu::Kernel* kernel = emu::find_kernel(function.name);
  return kernel ? kernel->static_shared_bytes : 0;
}

// Those that were current so far.
std::vector<std::map<int, int>>& devices() {
  static std::vector<std::map<int, int>> all;
  return all;
}

int current_device() {
  const emu::Options& options = emu::options();
  const std::map<int, int> attributes = {
      {cudaDevAttrMultiProcessorCount, options.num_sms},
      {cudaDevAttrComputeCapabilityMajor, options.compute_capability / 10},
      {cudaDevAttrComputeCapabilityMinor, options.compute_capability % 10},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, int(options.smem_limit)},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, options.smem_per_sm},
      {cudaDevAttrL2CacheSize, options.l2_bytes},
  };
  auto& all = devices();
  auto found = std::find(all.begin(), all.end(), attributes);
  if (found == all.end()) found = all.insert(all.end(), attributes);
  return int(found - all.begin());
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// ---- what nvcc's stubs call ----

void** __cudaRegisterFatBinary(void* binary) {
  return static_cast<void**>(binary);  // any handle will do
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
// Variables live in the translated file; the host cannot reach them.
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  device_functions()[stub] = {name, 0};
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes,
                                     CUstream_st* stream) {
  configuration = {grid, block, shared_bytes, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                       void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared_bytes = configuration.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  const auto entry = device_functions().find(stub);
  if (entry == device_functions().end()) return cudaErrorInvalidDeviceFunction;
  const DeviceFunction& function = entry->second;
  const uint32_t needed = static_shared_bytes(function) + uint32_t(shared_bytes);
  if (needed > kDefaultSharedBytes && shared_bytes > function.dynamic_shared_limit) {
    return cudaErrorInvalidValue;
  }
  return emu::launch_registered(function.name, to_emu(grid), to_emu(block), uint32_t(shared_bytes),
                                arguments)
             ? cudaSuccess
             : cudaErrorLaunchFailure;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared_bytes, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}

// ---- what launchers call ----

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  const auto entry = device_functions().find(stub);
  if (entry == device_functions().end()) return cudaErrorInvalidDeviceFunction;
  DeviceFunction& function = entry->second;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_shared_bytes(function) + uint32_t(value) > emu::options().smem_limit) {
    return cudaErrorInvalidValue;
  }
  function.dynamic_shared_limit = uint32_t(value);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device();
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= int(devices().size())) return cudaErrorInvalidDevice;
  const auto& attributes = devices()[device];
  const auto found = attributes.find(attribute);
  if (found == attributes.end()) return cudaErrorInvalidValue;
  *value = found->second;
  return cudaSuccess;
}

cudaError_t cudaGetLastError(void) { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error of the emulated CUDA runtime";
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned int,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(cuTensorMapEncodeTiled) : nullptr;
  if (found) *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// ---- the driver's part ----

static uint32_t element_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      return 4;
    default:
      return 0;
  }
}

static uint32_t swizzle_bytes(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_32B:
      return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      return 64;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      return 128;
    default:
      return 0;
  }
}

// With the checks of the CUDA Driver API, "Tensor Map Object Management".
CUresult cuTensorMapEncodeTiled(CUtensorMap* tensor_map, CUtensorMapDataType type, cuuint32_t rank,
                                void* base, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  emu::TensorMap map = {};
  map.base = reinterpret_cast<uint64_t>(base);
  map.rank = rank;
  map.element_bytes = element_bytes(type);
  map.swizzle = swizzle_bytes(swizzle);
  map.magic = emu::kTensorMapMagic;
  if (reinterpret_cast<uint64_t>(tensor_map) % 64 || map.base % 16) return CUDA_ERROR_INVALID_VALUE;
  if (rank < 1 || rank > 5 || map.element_bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return CUDA_ERROR_INVALID_VALUE;
  if (fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || sizes[i] > uint64_t{1} << 32) return CUDA_ERROR_INVALID_VALUE;
    if (box[i] == 0 || box[i] > 256 || element_strides[i] != 1) return CUDA_ERROR_INVALID_VALUE;
    map.size[i] = uint32_t(sizes[i]);
    map.box[i] = uint16_t(box[i]);
    if (i == 0) continue;
    const cuuint64_t stride = strides[i - 1];
    if (stride % 16 || stride >= uint64_t{1} << 40) return CUDA_ERROR_INVALID_VALUE;
    map.stride[i] = stride;
  }
  const uint32_t row_bytes = box[0] * map.element_bytes;
  if (row_bytes % 16 || (map.swizzle && row_bytes > map.swizzle)) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(tensor_map, &map, sizeof map);
  return CUDA_SUCCESS;
}

}  // extern "C"
#pragma GCC visibility pop
