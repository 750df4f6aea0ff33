// The CPU kernels that can run here, and threads for them.
#pragma once

#include <algorithm>
#include <cstring>
#include <thread>
#include <vector>

#include "kernels/arch.h"
#include "kernels/launch.h"

// Names of the architectures with kernels of the family that this CPU runs.
inline std::vector<const char*> cpu_archs(anyflash::Family family) {
  std::vector<const char*> archs;
  int32_t count = 0;
  const anyflash::Instance* instances = anyflash_instances(&count);
  const int32_t isa = anyflash_cpu_isa();
  for (int32_t i = 0; i < count; ++i) {
    const anyflash::Instance& instance = instances[i];
    if (instance.device != anyflash::Device::cpu || instance.family != family) continue;
    if (isa < instance.min_sm || isa > instance.max_sm) continue;
    const bool known = std::any_of(archs.begin(), archs.end(), [&](const char* arch) {
      return std::strcmp(arch, instance.arch) == 0;
    });
    if (!known) archs.push_back(instance.arch);
  }
  return archs;
}

// Null if there is none.
inline const anyflash::Instance* cpu_instance(anyflash::Family family,
                                              anyflash::Direction direction, anyflash::Dtype dtype,
                                              const char* arch) {
  int32_t count = 0;
  const anyflash::Instance* instances = anyflash_instances(&count);
  const anyflash::Instance* end = instances + count;
  const anyflash::Instance* found = std::find_if(instances, end, [&](const auto& instance) {
    return instance.family == family && instance.direction == direction &&
           instance.dtype == dtype && std::strcmp(instance.arch, arch) == 0;
  });
  return found == end ? nullptr : found;
}

// A ParallelFor with a thread for every `grain_size` numbers.
inline int32_t parallel_for(int64_t begin, int64_t end, int64_t grain_size,
                            anyflash::RangeBody body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; i += grain_size) {
    threads.emplace_back(body, i, std::min(end, i + grain_size), context);
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}
