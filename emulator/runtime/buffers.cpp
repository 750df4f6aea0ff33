#include "emulator/runtime/buffers.h"

#include <sys/mman.h>

#include <cstdio>
#include <map>

#include "emulator/runtime/global_memory.h"

namespace emu {

namespace {

std::map<uint64_t, Allocation> allocations;  // by the end of the mapping

}  // namespace

const Allocation* find_allocation(uint64_t address) {
  const auto entry = allocations.upper_bound(address);
  if (entry == allocations.end()) return nullptr;
  return address >= entry->second.mapping_begin ? &entry->second : nullptr;
}

std::string place(uint64_t address) {
  char text[80];
  const Allocation* buffer = find_allocation(address);
  if (buffer) {
    snprintf(text, sizeof text, "byte %ld of a buffer of %lu",
             static_cast<long>(address - buffer->begin),
             static_cast<unsigned long>(buffer->end - buffer->begin));
  } else {
    snprintf(text, sizeof text, "address %#lx", static_cast<unsigned long>(address));
  }
  return text;
}

void* global_malloc(size_t bytes, int fill) {
  const size_t body = (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
  const size_t mapped = body + 2 * kPageBytes;
  void* mapping = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  char* usable = static_cast<char*>(mapping) + kPageBytes;
  mprotect(usable, body, PROT_READ | PROT_WRITE);
  std::memset(usable, fill, body);
  char* data = usable + body - (bytes + 15) / 16 * 16;
  const uint64_t begin = reinterpret_cast<uint64_t>(data);
  const uint64_t mapping_begin = reinterpret_cast<uint64_t>(mapping);
  const uint64_t mapping_end = mapping_begin + mapped;
  allocations[mapping_end] = {begin, begin + bytes, mapping_begin, mapping_end};
  forget_accesses(mapping_begin, mapping_end);
  return data;
}

void global_free(void* pointer) {
  const Allocation* found = find_allocation(reinterpret_cast<uint64_t>(pointer));
  if (!found) return;
  const Allocation allocation = *found;
  allocations.erase(allocation.mapping_end);
  forget_accesses(allocation.mapping_begin, allocation.mapping_end);
  munmap(reinterpret_cast<void*>(allocation.mapping_begin),
         allocation.mapping_end - allocation.mapping_begin);
}

}  // namespace emu
