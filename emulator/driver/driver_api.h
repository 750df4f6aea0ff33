// The CUDA driver API for programs that run on a GPU and on the emulator: found in libcuda.so.1 at
// run time, so that neither a toolkit nor a driver is needed to build them.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace driver_api {

using DevicePointer = unsigned long long;
using Context = struct ContextRecord*;
using Module = struct ModuleRecord*;
using Function = struct FunctionRecord*;

// CUtensorMap's parameters that tests and the emulator know.
enum : int32_t {
  kTypeUint8 = 0,
  kTypeUint16,
  kTypeUint32,
  kTypeInt32,
  kTypeFloat16 = 6,
  kTypeFloat32,
  kTypeBfloat16 = 9
};
enum : int32_t { kSwizzleNone, kSwizzle32, kSwizzle64, kSwizzle128 };

// FUNCTION(member, symbol, parameters)
#define DRIVER_API_FUNCTIONS(FUNCTION)                                                             \
  FUNCTION(init, cuInit, (unsigned))                                                               \
  FUNCTION(get_device, cuDeviceGet, (int*, int))                                                   \
  FUNCTION(retain_primary, cuDevicePrimaryCtxRetain, (Context*, int))                              \
  FUNCTION(set_context, cuCtxSetCurrent, (Context))                                                \
  FUNCTION(synchronize, cuCtxSynchronize, ())                                                      \
  FUNCTION(allocate, cuMemAlloc_v2, (DevicePointer*, size_t))                                      \
  FUNCTION(release, cuMemFree_v2, (DevicePointer))                                                 \
  FUNCTION(fill, cuMemsetD8_v2, (DevicePointer, unsigned char, size_t))                            \
  FUNCTION(copy_in, cuMemcpyHtoD_v2, (DevicePointer, const void*, size_t))                         \
  FUNCTION(copy_out, cuMemcpyDtoH_v2, (void*, DevicePointer, size_t))                              \
  FUNCTION(load_module, cuModuleLoadData, (Module*, const void*))                                  \
  FUNCTION(get_function, cuModuleGetFunction, (Function*, Module, const char*))                    \
  FUNCTION(launch, cuLaunchKernel,                                                                 \
           (Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, \
            void**, void**))                                                                       \
  FUNCTION(encode_tiled, cuTensorMapEncodeTiled,                                                   \
           (void*, int32_t, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,    \
            const uint32_t*, int32_t, int32_t, int32_t, int32_t))

// Ends the program where something fails.
inline void require(int result, const char* what) {
  if (result == 0) return;
  std::fprintf(stderr, "%s failed: error %d of the CUDA driver\n", what, result);
  std::exit(1);
}

// The driver, with the primary context of device 0 current.
class Driver {
 public:
#define FUNCTION(member, symbol, parameters) int(*member) parameters;
  DRIVER_API_FUNCTIONS(FUNCTION)
#undef FUNCTION

  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

 private:
  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    require(library ? 0 : -1, "loading libcuda.so.1");
#define FUNCTION(member, symbol, parameters)                            \
  member = reinterpret_cast<decltype(member)>(dlsym(library, #symbol)); \
  require(member ? 0 : -1, "finding " #symbol);
    DRIVER_API_FUNCTIONS(FUNCTION)
#undef FUNCTION
    int device = 0;
    Context context = nullptr;
    require(init(0), "cuInit");
    require(get_device(&device, 0), "cuDeviceGet");
    require(retain_primary(&context, device), "cuDevicePrimaryCtxRetain");
    require(set_context(context), "cuCtxSetCurrent");
  }
};

}  // namespace driver_api
