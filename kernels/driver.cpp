#include "kernels/driver.h"

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "kernels/common/launch_kernel.h"
#include "kernels/cubin.h"
#include "kernels/drivers.h"
#include "kernels/launch.h"

namespace anyflash {
namespace driver {
namespace {

// ---- what went wrong ----

// Last in this thread, in words.
struct Failure {
  int32_t code;
  char text[512];
};
thread_local Failure failure{};

__attribute__((format(printf, 2, 3))) int32_t fail(int32_t code, const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(failure.text, sizeof failure.text, format, values);
  va_end(values);
  return failure.code = code;
}

// ---- the driver ----

struct Driver {
#define FUNCTION(member, symbol, parameters) Result(*member) parameters = nullptr;
  ANYFLASH_DRIVER_FUNCTIONS(FUNCTION)
#undef FUNCTION
  int version = 0;

  // 0, or the driver's code with a text that says what was tried.
  int32_t check(Result result, const char* what, const char* of = "") const {
    if (result == 0) return 0;
    const char* name = nullptr;  // and left so for a code that the driver does not know
    const char* text = nullptr;
    error_name(result, &name);
    error_text(result, &text);
    return fail(result, "%s%s: %s (%s, %d)", what, of, text ? text : "an unknown error",
                name ? name : "CUresult", result);
  }

  // Finds everything that this driver has.
  int32_t open() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) return fail(kErrorNoCuda, "no NVIDIA driver: %s", dlerror());
    const char* missing = nullptr;
#define FUNCTION(member, symbol, parameters)                            \
  member = reinterpret_cast<decltype(member)>(dlsym(library, #symbol)); \
  if (!member) missing = #symbol;
    ANYFLASH_DRIVER_FUNCTIONS(FUNCTION)
#undef FUNCTION
    const bool usable =
        get_version && init && get_device && get_attribute && error_name && error_text;
    int found = 0;
    if (!usable || get_version(&found) != 0 || (missing && found >= kOldestVersion)) {
      return fail(kErrorNoCuda, "libcuda.so.1 is no driver of NVIDIA's: it has no %s",
                  missing ? missing : "version");
    }
    if (const int32_t error = check(init(0), "cuInit")) return error;
    version = found;
    return 0;
  }
};

// A driver that is not there is looked for again in the next call.
int32_t find(const Driver** found) {
  static std::mutex mutex;
  static Driver driver;
  const std::lock_guard<std::mutex> lock(mutex);
  *found = &driver;
  return driver.version > 0 ? 0 : driver.open();
}

// One that can load and launch.
int32_t find_new_enough(const Driver** found) {
  if (const int32_t error = find(found)) return error;
  const int version = (*found)->version;
  if (version >= kOldestVersion) return 0;
  return fail(kErrorOldDriver,
              "the NVIDIA driver is too old: it knows CUDA %d.%d, these kernels need %d.%d (driver "
              "R%d) or newer",
              version / 1000, version % 1000 / 10, kOldestVersion / 1000,
              kOldestVersion % 1000 / 10, driver_branch(kOldestVersion));
}

// ---- contexts ----

// The calling thread's context. One that has none gets what the CUDA runtime would give it: the
// primary context of device 0.
int32_t current_context(const Driver& driver, Context* context) {
  if (const int32_t error = driver.check(driver.get_context(context), "cuCtxGetCurrent")) {
    return error;
  }
  if (*context) return 0;
  DeviceHandle first = 0;
  if (const int32_t error = driver.check(driver.get_device(&first, 0), "cuDeviceGet")) return error;
  const Result retained = driver.retain_primary(context, first);  // for good, as the runtime does
  if (const int32_t error = driver.check(retained, "cuDevicePrimaryCtxRetain")) return error;
  return driver.check(driver.set_context(*context), "cuCtxSetCurrent");
}

int32_t current_device(const Driver& driver, DeviceHandle* device) {
  Context context = nullptr;
  if (const int32_t error = current_context(driver, &context)) return error;
  return driver.check(driver.get_current_device(device), "cuCtxGetDevice");
}

int32_t sm_of(const Driver& driver, DeviceHandle device) {
  int major = 0;
  int minor = 0;
  if (driver.get_attribute(&major, attribute::major, device) != 0 ||
      driver.get_attribute(&minor, attribute::minor, device) != 0) {
    return 0;
  }
  return major * 10 + minor;
}

DeviceLimits limits_of(const Driver& driver, DeviceHandle device) {
  DeviceLimits limits;
  const struct {
    int32_t attribute;
    int32_t* value;
  } kAttributes[] = {
      {attribute::multiprocessors, &limits.multiprocessors},
      {attribute::shared_bytes_per_block, &limits.shared_bytes_per_block},
      {attribute::shared_bytes_per_multiprocessor, &limits.shared_bytes_per_multiprocessor},
      {attribute::l2_bytes, &limits.l2_bytes},
  };
  for (const auto& [attribute, value] : kAttributes) {
    if (driver.get_attribute(value, attribute, device) != 0) return {};
  }
  limits.sm = sm_of(driver, device);
  return limits;
}

// ---- modules and functions ----

std::vector<char> changed(const Cubin& cubin) {
  const char* data = static_cast<const char*>(cubin.data);
  std::vector<char> code(data, data + cubin.bytes);
  for (int64_t i = 0; i < cubin.num_changes; ++i) {
    code[cubin.changes[i] >> 8] = char(cubin.changes[i] & 0xFF);
  }
  return code;
}

// Loading may not break the capture of a graph anywhere in the process.
class CaptureRelaxed {
 public:
  explicit CaptureRelaxed(const Driver& driver) : driver_(driver) {
    driver_.exchange_capture_mode(&mode_);
  }
  ~CaptureRelaxed() { driver_.exchange_capture_mode(&mode_); }
  CaptureRelaxed(const CaptureRelaxed&) = delete;

 private:
  const Driver& driver_;
  int32_t mode_ = kCaptureRelaxed;
};

// A module is loaded once per cubin and context, at the first launch from it.
class Modules {
 public:
  // Never destroyed: the driver may be gone by then.
  static Modules& get() {
    static Modules* modules = new Modules;
    return *modules;
  }

  // The kernel in the current context, ready for so much dynamic shared memory.
  int32_t function(const Driver& driver, const GpuKernel& kernel, uint32_t shared_bytes,
                   Function* function) {
    Context context = nullptr;
    if (const int32_t error = current_context(driver, &context)) return error;
    unsigned long long id = 0;  // an address may be used again, an id is not
    if (const int32_t error = driver.check(driver.get_context_id(context, &id), "cuCtxGetId")) {
      return error;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    Entry& entry = entries_[{id, &kernel}];
    if (!entry.function) {
      if (const int32_t error = find(driver, id, kernel, &entry.function)) return error;
    }
    if (shared_bytes > entry.shared_bytes) {
      const Result set =
          driver.set_function_attribute(entry.function, kMaxDynamicSharedBytes, int(shared_bytes));
      if (const int32_t error = driver.check(set, "shared memory of ", kernel.name)) return error;
      entry.shared_bytes = shared_bytes;
    }
    *function = entry.function;
    return 0;
  }

 private:
  struct Entry {
    Function function = nullptr;
    uint32_t shared_bytes = kSharedBytesOfAnyKernel;
  };

  int32_t find(const Driver& driver, uint64_t context, const GpuKernel& kernel,
               Function* function) {
    Module& module = modules_[{context, kernel.cubins}];
    const CaptureRelaxed relaxed(driver);
    if (!module) {
      if (const int32_t error = load(driver, kernel, &module)) return error;
    }
    return driver.check(driver.get_function(function, module, kernel.name), "no kernel ",
                        kernel.name);
  }

  int32_t load(const Driver& driver, const GpuKernel& kernel, Module* module) {
    DeviceHandle device = 0;
    if (const int32_t error = driver.check(driver.get_current_device(&device), "cuCtxGetDevice")) {
      return error;
    }
    const int32_t sm = sm_of(driver, device);
    const Cubin* cubin = cubin_for(kernel.cubins, sm);
    if (!cubin) return fail(kErrorNoCode, "no machine code for sm_%d of %s", sm, kernel.name);
    char what[64];
    std::snprintf(what, sizeof what, "on sm_%d the driver refuses the sm_%d code of ", sm,
                  cubin->sm);
    if (cubin->num_changes == 0) {
      return driver.check(driver.load_module(module, cubin->data), what, kernel.name);
    }
    const std::vector<char> code = changed(*cubin);  // of which the driver keeps what it needs
    return driver.check(driver.load_module(module, code.data()), what, kernel.name);
  }

  std::mutex mutex_;
  std::map<std::pair<uint64_t, const Cubin*>, Module> modules_;
  std::map<std::pair<uint64_t, const GpuKernel*>, Entry> entries_;
};

}  // namespace

int32_t version() {
  const Driver* driver = nullptr;
  return find(&driver) == 0 ? driver->version : 0;
}

int32_t device_sm(int32_t ordinal) {
  const Driver* driver = nullptr;
  DeviceHandle device = 0;
  if (find(&driver) != 0 || driver->get_device(&device, ordinal) != 0) return 0;
  return sm_of(*driver, device);
}

const char* error_text(int32_t code) {
  if (code == failure.code) return failure.text;
  const Driver* driver = nullptr;
  const char* text = nullptr;
  if (code > 0 && find(&driver) == 0) driver->error_text(code, &text);
  return text ? text : "an error of the NVIDIA driver";
}

}  // namespace driver

int32_t launch_on_device(const void* kernel, Grid grid, void** arguments, void* stream) {
  using namespace driver;
  const Driver* driver = nullptr;
  if (const int32_t error = find_new_enough(&driver)) return error;
  const auto& of = *static_cast<const GpuKernel*>(kernel);
  Function function = nullptr;
  const int32_t found = Modules::get().function(*driver, of, grid.shared_bytes, &function);
  if (found != 0) return found;
  const Result launched =
      driver->launch(function, grid.x, grid.y, 1, grid.threads, 1, 1, grid.shared_bytes,
                     static_cast<Stream>(stream), arguments, nullptr);
  return driver->check(launched, "the launch of ", of.name);
}

DeviceLimits device_limits() {
  using namespace driver;
  static std::mutex mutex;
  static std::map<DeviceHandle, DeviceLimits> known;
  const Driver* driver = nullptr;
  DeviceHandle device = 0;
  if (find_new_enough(&driver) != 0 || current_device(*driver, &device) != 0) return {};
  const std::lock_guard<std::mutex> lock(mutex);
  DeviceLimits& limits = known[device];
  if (limits.sm == 0) limits = limits_of(*driver, device);
  return limits;
}

}  // namespace anyflash
