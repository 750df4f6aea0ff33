// The emulator as a libcuda.so.1: kernels are looked up by their mangled names and run at once.
//
// Link what launches with it: a program that opens libcuda.so.1 then finds this one, which has that
// name. Add functions here when launchers come to need them.
#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "emulator/driver/driver_api.h"
#include "emulator/runtime/emulator.h"

using namespace driver_api;

namespace {

enum : int { kSuccess = 0, kInvalidValue = 1, kNotFound = 500, kLaunchFailed = 719 };

constexpr int kVersion = 13000;
constexpr int kMaxDynamicSharedBytes = 8;            // CUfunction_attribute
constexpr uint32_t kDefaultSharedBytes = 48 * 1024;  // more must be asked for

struct EmulatedFunction {
  const emu::Kernel* kernel;
  uint32_t dynamic_shared_limit;
};

EmulatedFunction* emulated(Function function) {
  return reinterpret_cast<EmulatedFunction*>(function);
}

// CUdevice_attribute to value.
using Attributes = std::map<int, int>;

// Those that were current so far. Each is its own context.
std::vector<Attributes>& devices() {
  static std::vector<Attributes> all;
  return all;
}

int current_device() {
  const emu::Options& options = emu::options();
  const Attributes attributes = {{16, options.num_sms},
                                 {38, options.l2_bytes},
                                 {75, options.compute_capability / 10},
                                 {76, options.compute_capability % 10},
                                 {81, options.smem_per_sm},
                                 {97, int(options.smem_limit)}};
  auto& all = devices();
  auto found = std::find(all.begin(), all.end(), attributes);
  if (found == all.end()) found = all.insert(all.end(), attributes);
  return int(found - all.begin());
}

int current_context(Context* context) {
  *context = reinterpret_cast<Context>(uintptr_t(current_device() + 1));
  return kSuccess;
}

uint32_t element_bytes(int32_t type) {
  switch (type) {
    case kTypeUint8:
      return 1;
    case kTypeUint16:
    case kTypeFloat16:
    case kTypeBfloat16:
      return 2;
    case kTypeUint32:
    case kTypeInt32:
    case kTypeFloat32:
      return 4;
    default:
      return 0;
  }
}

uint32_t swizzle_bytes(int32_t swizzle) {
  switch (swizzle) {
    case kSwizzle32:
      return 32;
    case kSwizzle64:
      return 64;
    case kSwizzle128:
      return 128;
    default:
      return 0;
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int cuDriverGetVersion(int* version) {
  *version = kVersion;
  return kSuccess;
}

int cuInit(unsigned) { return kSuccess; }

int cuGetErrorName(int, const char** name) {
  *name = "CUDA_ERROR_OF_THE_EMULATOR";
  return kSuccess;
}

int cuGetErrorString(int, const char** text) {
  *text = "an error of the emulated driver";
  return kSuccess;
}

// ---- devices and contexts ----

int cuDeviceGet(int* device, int) {
  *device = current_device();
  return kSuccess;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (device < 0 || device >= int(devices().size())) return kInvalidValue;
  const auto found = devices()[device].find(attribute);
  if (found == devices()[device].end()) return kInvalidValue;
  *value = found->second;
  return kSuccess;
}

int cuDevicePrimaryCtxRetain(Context* context, int) { return current_context(context); }
int cuCtxGetCurrent(Context* context) { return current_context(context); }
int cuCtxSetCurrent(Context) { return kSuccess; }

int cuCtxGetDevice(int* device) { return cuDeviceGet(device, 0); }

int cuCtxGetId(Context context, unsigned long long* id) {
  *id = reinterpret_cast<uintptr_t>(context);
  return kSuccess;
}

// Launches return when they are done; what was reported fails the next synchronisation.
int cuCtxSynchronize() {
  const emu::Result result = emu::take_result();
  std::fputs(result.text().c_str(), stderr);
  return result.reports.empty() ? kSuccess : kLaunchFailed;
}

int cuThreadExchangeStreamCaptureMode(int*) { return kSuccess; }

// ---- memory ----

int cuMemAlloc_v2(DevicePointer* pointer, size_t bytes) {
  *pointer = reinterpret_cast<DevicePointer>(emu::global_malloc(bytes));
  return kSuccess;
}

int cuMemFree_v2(DevicePointer pointer) {
  emu::global_free(reinterpret_cast<void*>(pointer));
  return kSuccess;
}

int cuMemsetD8_v2(DevicePointer pointer, unsigned char value, size_t bytes) {
  std::memset(reinterpret_cast<void*>(pointer), value, bytes);
  return kSuccess;
}

int cuMemcpyHtoD_v2(DevicePointer to, const void* from, size_t bytes) {
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return kSuccess;
}

int cuMemcpyDtoH_v2(void* to, DevicePointer from, size_t bytes) {
  std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return kSuccess;
}

// ---- modules and launches ----

// What is in the image does not matter: kernels are those of the translated files.
int cuModuleLoadData(Module* module, const void*) {
  static int any;
  *module = reinterpret_cast<Module>(&any);
  return kSuccess;
}

int cuModuleGetFunction(Function* function, Module, const char* name) {
  const emu::Kernel* kernel = emu::find_kernel(name);
  if (!kernel) return kNotFound;
  const uint32_t limit = kDefaultSharedBytes - kernel->static_shared_bytes;
  *function = reinterpret_cast<Function>(new EmulatedFunction{kernel, limit});  // for good
  return kSuccess;
}

int cuFuncSetAttribute(Function function, int attribute, int value) {
  EmulatedFunction& emulated_function = *emulated(function);
  const uint32_t static_bytes = emulated_function.kernel->static_shared_bytes;
  if (attribute != kMaxDynamicSharedBytes || value < 0 ||
      static_bytes + uint32_t(value) > emu::options().smem_limit) {
    return kInvalidValue;
  }
  emulated_function.dynamic_shared_limit = uint32_t(value);
  return kSuccess;
}

int cuLaunchKernel(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                   void*, void** arguments, void**) {
  const EmulatedFunction& emulated_function = *emulated(function);
  if (shared_bytes > emulated_function.dynamic_shared_limit) return kInvalidValue;
  return emu::launch_registered(emulated_function.kernel->name, {grid_x, grid_y, grid_z},
                                {block_x, block_y, block_z}, shared_bytes, arguments)
             ? kSuccess
             : kLaunchFailed;
}

// With the checks of the CUDA Driver API, "Tensor Map Object Management".
int cuTensorMapEncodeTiled(void* tensor_map, int32_t type, uint32_t rank, void* base,
                           const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
                           const uint32_t* element_strides, int32_t interleave, int32_t swizzle,
                           int32_t, int32_t fill) {
  emu::TensorMap map = {};
  map.base = reinterpret_cast<uint64_t>(base);
  map.rank = rank;
  map.element_bytes = element_bytes(type);
  map.swizzle = swizzle_bytes(swizzle);
  map.magic = emu::kTensorMapMagic;
  if (reinterpret_cast<uint64_t>(tensor_map) % 64 || map.base % 16) return kInvalidValue;
  if (rank < 1 || rank > 5 || map.element_bytes == 0) return kInvalidValue;
  if (interleave != 0 || fill != 0) return kInvalidValue;
  for (uint32_t i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || sizes[i] > uint64_t{1} << 32) return kInvalidValue;
    if (box[i] == 0 || box[i] > 256 || element_strides[i] != 1) return kInvalidValue;
    map.size[i] = uint32_t(sizes[i]);
    map.box[i] = uint16_t(box[i]);
    if (i == 0) continue;
    const uint64_t stride = strides[i - 1];
    if (stride % 16 || stride >= uint64_t{1} << 40) return kInvalidValue;
    map.stride[i] = stride;
  }
  const uint32_t row_bytes = box[0] * map.element_bytes;
  if (row_bytes % 16 || (map.swizzle && row_bytes > map.swizzle)) return kInvalidValue;
  std::memcpy(tensor_map, &map, sizeof map);
  return kSuccess;
}

}  // extern "C"
#pragma GCC visibility pop
