#include "fake_driver.h"

#include <chrono>
#include <thread>
#include <utility>

using namespace anyflash::driver;
using namespace fake_driver;

struct anyflash::driver::ModuleRecord {
  std::string image;
  unsigned long long context;
};

struct anyflash::driver::FunctionRecord {
  std::string name;
  Module module;
};

namespace {

enum : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kNotFound = 500
};

thread_local Context current = nullptr;
thread_local int32_t capture_mode = 0;  // global

State state;

// Notes the call under the lock, with what else is to be noted of it unless it fails.
template <typename Note>
int call(const char* function, Note note) {
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.calls.push_back(function);
  const auto error = state.errors.find(function);
  return error == state.errors.end() || error->second == 0 ? note() : error->second;
}

int call(const char* function) {
  return call(function, [] { return kSuccess; });
}

// As NVIDIA's: null for a code that it does not know.
int describe(int error, const char* no_device, const char* no_binary, const char** text) {
  *text = error == kNoDevice ? no_device : error == kNoBinary ? no_binary : nullptr;
  return *text ? kSuccess : kInvalidValue;
}

}  // namespace

State& fake_driver::fake_driver_state() { return state; }

#pragma GCC visibility push(default)
extern "C" {

int cuDriverGetVersion(int* version) {
  *version = state.version;
  return call("cuDriverGetVersion");
}

int cuInit(unsigned) { return call("cuInit"); }

int cuGetErrorName(int error, const char** name) {
  return describe(error, "CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_NO_BINARY_FOR_GPU", name);
}

int cuGetErrorString(int error, const char** text) {
  return describe(error, "there is no GPU", "no kernel image is available", text);
}

// ---- devices and contexts ----

int cuDeviceGet(DeviceHandle* device, int ordinal) {
  return call("cuDeviceGet", [&] {
    *device = ordinal;
    return ordinal < int(state.devices.size()) ? kSuccess : kInvalidValue;
  });
}

int cuDeviceGetAttribute(int* value, int32_t attribute, DeviceHandle device) {
  return call("cuDeviceGetAttribute", [&] {
    const auto found = state.devices.at(device).find(attribute);
    if (found == state.devices[device].end()) return kInvalidValue;
    *value = found->second;
    return kSuccess;
  });
}

int cuDevicePrimaryCtxRetain(Context* context, DeviceHandle device) {
  return call("cuDevicePrimaryCtxRetain", [&] {
    *context = &state.primary[device];
    **context = {device, kPrimaryIds + device};
    return kSuccess;
  });
}

int cuCtxGetCurrent(Context* context) {
  *context = current;
  return call("cuCtxGetCurrent");
}

int cuCtxSetCurrent(Context context) {
  current = context;
  return call("cuCtxSetCurrent");
}

int cuCtxGetDevice(DeviceHandle* device) {
  if (!current) return kInvalidContext;
  *device = current->device;
  return call("cuCtxGetDevice");
}

int cuCtxGetId(Context context, unsigned long long* id) {
  *id = context->id;
  return call("cuCtxGetId");
}

int cuThreadExchangeStreamCaptureMode(int32_t* mode) {
  std::swap(*mode, capture_mode);
  return call("cuThreadExchangeStreamCaptureMode", [] {
    state.capture_modes.push_back(capture_mode);
    return kSuccess;
  });
}

// ---- modules and launches ----

int cuModuleLoadData(Module* module, const void* data) {
  std::this_thread::sleep_for(std::chrono::milliseconds(10));  // for other threads to come here too
  return call("cuModuleLoadData", [&] {
    const auto image = static_cast<const char*>(data);
    state.loads.push_back({image, current->id, capture_mode});
    *module = new ModuleRecord{image, current->id};  // for good, like what follows
    return kSuccess;
  });
}

int cuModuleGetFunction(Function* function, Module module, const char* name) {
  return call("cuModuleGetFunction", [&] {
    if (module->image.find(name) == std::string::npos) return kNotFound;
    state.functions.push_back(name);
    *function = new FunctionRecord{name, module};
    return kSuccess;
  });
}

int cuFuncSetAttribute(Function function, int32_t attribute, int value) {
  return call("cuFuncSetAttribute", [&] {
    if (attribute != kMaxDynamicSharedBytes) return kInvalidValue;
    state.shared_bytes.push_back({function->name, value});
    return kSuccess;
  });
}

int cuLaunchKernel(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                   Stream stream, void** arguments, void**) {
  return call("cuLaunchKernel", [&] {
    if (function->module->context != current->id) return kInvalidHandle;
    state.launches.push_back({function->name,
                              {grid_x, grid_y, grid_z},
                              {block_x, block_y, block_z},
                              shared_bytes,
                              stream,
                              {static_cast<const char*>(arguments[0]), state.argument_bytes}});
    return kSuccess;
  });
}

}  // extern "C"
#pragma GCC visibility pop
