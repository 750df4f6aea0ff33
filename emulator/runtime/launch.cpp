// Launches: kernels that translated files registered, or functions of a test.
#include <map>
#include <string>

#include "emulator/runtime/block.h"
#include "emulator/runtime/faults.h"
#include "emulator/runtime/global_memory.h"
#include "emulator/runtime/report.h"

namespace emu {

namespace {

constexpr uint32_t kMaxThreads = 1024;
constexpr uint32_t kMaxGridX = 0x7FFFFFFF;
constexpr uint32_t kMaxGridYZ = 0xFFFF;
constexpr Clock kLastEpoch = ~Clock{0} / 2;  // leaves half of the range for one launch
constexpr uint32_t kParameterBytes = 32764;  // PTX ISA: sm_70 and later

std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> registered;
  return registered;
}

bool is_configuration(Dim3 grid, Dim3 size, uint32_t max_threads, uint32_t shared_bytes) {
  const uint64_t threads = uint64_t(size.x) * size.y * size.z;
  if (threads == 0 || threads % 32 || threads > max_threads) {
    report("launch", nullptr, "blocks of %lu threads, at most %u in whole warps",
           static_cast<unsigned long>(threads), max_threads);
    return false;
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > kMaxGridX || grid.y > kMaxGridYZ ||
      grid.z > kMaxGridYZ) {
    report("launch", nullptr, "grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
    return false;
  }
  if (shared_bytes > current_options.smem_limit) {
    report("launch", nullptr, "%u bytes of shared memory, at most %u", shared_bytes,
           current_options.smem_limit);
    return false;
  }
  return true;
}

bool run(const char* name, Dim3 grid, Dim3 size, uint32_t max_threads, uint32_t shared_bytes,
         const std::function<void()>& kernel) {
  block.kernel_name = name;
  regs = {{0, 0, 0}, {0, 0, 0}, size, grid, 0};
  if (!is_configuration(grid, size, max_threads, shared_bytes)) return false;
  ++result.stats.launches;
  result.launches.push_back({name, grid, size, shared_bytes});
  if (block.epoch > kLastEpoch) {
    block.epoch = 0;
    forget_all_accesses();
  }
  block.shape(name, size, shared_bytes, kernel);
  const FaultHandler fault_handler;
  for (regs.ctaid.z = 0; regs.ctaid.z < grid.z; ++regs.ctaid.z) {
    for (regs.ctaid.y = 0; regs.ctaid.y < grid.y; ++regs.ctaid.y) {
      for (regs.ctaid.x = 0; regs.ctaid.x < grid.x; ++regs.ctaid.x) {
        ++result.stats.blocks;
        block.random.seed(current_options.seed * 1000003 + result.stats.blocks);
        block.run();
        if (block.stopped) return false;
      }
    }
  }
  return true;
}

}  // namespace

Options current_options;
Options& options() { return current_options; }

int register_kernel(Kernel kernel) {
  kernels()[kernel.name] = std::move(kernel);
  forget_source_lines();
  return 0;
}

const Kernel* find_kernel(const char* mangled_name) {
  const auto entry = kernels().find(mangled_name);
  return entry == kernels().end() ? nullptr : &entry->second;
}

bool launch(const char* name, Dim3 grid, Dim3 size, uint32_t shared_bytes,
            const std::function<void()>& kernel) {
  return run(name, grid, size, kMaxThreads, shared_bytes, kernel);
}

bool launch_registered(const char* mangled_name, Dim3 grid, Dim3 size,
                       uint32_t dynamic_shared_bytes, void* const* arguments) {
  const Kernel* kernel = find_kernel(mangled_name);
  if (!kernel) {
    block.kernel_name = mangled_name;
    report("launch", nullptr, "no translated file registered this kernel");
    return false;
  }
  alignas(64) static unsigned char params[kParameterBytes];
  for (size_t i = 0; i < kernel->parameters.size(); ++i) {
    const Parameter& parameter = kernel->parameters[i];
    std::memcpy(params + parameter.offset, arguments[i], parameter.bytes);
  }
  return run(kernel->name, grid, size, kernel->max_threads,
             kernel->static_shared_bytes + dynamic_shared_bytes, [&] { kernel->function(params); });
}

}  // namespace emu
