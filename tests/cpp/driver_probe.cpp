// driver_probe <libcuda.so.1> <its version> <what cuInit returns>: a launch in a process that has
// not found a driver yet. Prints the version found, the error and its text.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

#include "fake_driver.h"
#include "kernels/common/launch_kernel.h"
#include "kernels/cubin.h"

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (!library) return std::puts(dlerror()), 1;
  auto& fake = reinterpret_cast<decltype(&fake_driver::fake_driver_state)>(
      dlsym(library, "fake_driver_state"))();
  fake.version = std::atoi(arguments[2]);
  fake.errors["cuInit"] = std::atoi(arguments[3]);
  const anyflash::GpuKernel kernel{"forward", nullptr};
  const int32_t error = anyflash::launch_on_device(&kernel, {1, 1, 32}, nullptr, nullptr);
  const char* text = anyflash::driver::error_text(error);
  std::printf("%d %d %s", anyflash::driver::version(), error, text);
}
