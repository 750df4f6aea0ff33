// The CUDA driver of this process, the libcuda.so.1 that torch has loaded too. Nothing of CUDA is
// linked or included, and every driver from R525 (CUDA 12.0) on will do.
#pragma once

#include "kernels/portable.h"

namespace anyflash::driver {

using Result = int32_t;  // CUresult
using DeviceHandle = int32_t;
using Context = struct ContextRecord*;
using Module = struct ModuleRecord*;
using Function = struct FunctionRecord*;
using Stream = struct StreamRecord*;

constexpr int32_t kOldestVersion = 12000;

constexpr int32_t kMaxDynamicSharedBytes = 8;  // CUfunction_attribute
constexpr int32_t kCaptureRelaxed = 2;         // CUstreamCaptureMode

namespace attribute {  // CUdevice_attribute
constexpr int32_t multiprocessors = 16, l2_bytes = 38, major = 75, minor = 76,
                  shared_bytes_per_multiprocessor = 81, shared_bytes_per_block = 97;
}

// FUNCTION(member, symbol, parameters), all with these names in CUDA 12.0. The first six are in
// every driver.
#define ANYFLASH_DRIVER_FUNCTIONS(FUNCTION)                                                 \
  FUNCTION(get_version, cuDriverGetVersion, (int*))                                         \
  FUNCTION(init, cuInit, (unsigned))                                                        \
  FUNCTION(get_device, cuDeviceGet, (DeviceHandle*, int))                                   \
  FUNCTION(get_attribute, cuDeviceGetAttribute, (int*, int32_t, DeviceHandle))              \
  FUNCTION(error_name, cuGetErrorName, (Result, const char**))                              \
  FUNCTION(error_text, cuGetErrorString, (Result, const char**))                            \
  FUNCTION(retain_primary, cuDevicePrimaryCtxRetain, (Context*, DeviceHandle))              \
  FUNCTION(get_context, cuCtxGetCurrent, (Context*))                                        \
  FUNCTION(set_context, cuCtxSetCurrent, (Context))                                         \
  FUNCTION(get_current_device, cuCtxGetDevice, (DeviceHandle*))                             \
  FUNCTION(get_context_id, cuCtxGetId, (Context, unsigned long long*))                      \
  FUNCTION(exchange_capture_mode, cuThreadExchangeStreamCaptureMode, (int32_t*))            \
  FUNCTION(load_module, cuModuleLoadData, (Module*, const void*))                           \
  FUNCTION(get_function, cuModuleGetFunction, (Function*, Module, const char*))             \
  FUNCTION(set_function_attribute, cuFuncSetAttribute, (Function, int32_t, int))            \
  FUNCTION(launch, cuLaunchKernel,                                                          \
           (Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, \
            Stream, void**, void**))

// The newest CUDA that the driver knows: 12040 = 12.4; 0 without a driver.
int32_t version();

// Compute capability of a device as major * 10 + minor; 0 where it cannot be told.
int32_t device_sm(int32_t device);

// What a code that this thread got means: the driver's are positive, launch.h has ours.
const char* error_text(int32_t code);

}  // namespace anyflash::driver
