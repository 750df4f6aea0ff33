// ld, st, atom and red in the shared, global and generic state spaces.
#include "emulator/runtime/bank_conflicts.h"
#include "emulator/runtime/buffers.h"
#include "emulator/runtime/copy_small.h"
#include "emulator/runtime/fiber.h"
#include "emulator/runtime/global_memory.h"
#include "emulator/runtime/report.h"
#include "emulator/runtime/shared_memory.h"

namespace emu {

namespace {

// Host addresses of what an instruction may access, after all checks.

void* in_shared(uint32_t address, int bytes, Access access, const char* what, const void* site) {
  const uint32_t offset = shared_offset(address, bytes, bytes, what, site);
  track_shared(offset, bytes, access, self->actor(), site);
  return shared_memory + offset;
}

void* in_global(uint64_t address, int bytes, Access access, const void* site) {
  if (address % uint64_t(bytes)) {
    EMU_FAIL("misaligned", site, "access of %d bytes at global address %#lx", bytes,
             static_cast<unsigned long>(address));
  }
  track_global(address, bytes, access, self->actor(), site);
  return reinterpret_cast<void*>(address);
}

// Local memory is the stack.
void* in_generic(uint64_t address, int bytes, Access access, const void* site) {
  void* const pointer = reinterpret_cast<void*>(address);
  if (on_stack(pointer)) return pointer;
  if (!generic_is_shared(address)) return in_global(address, bytes, access, site);
  return in_shared(uint32_t(generic_to_shared(address)), bytes, access, "generic access", site);
}

}  // namespace

void ld_shared(uint32_t address, void* out, int bytes) {
  const void* site = EMU_SITE;
  copy_small(out, in_shared(address, bytes, Access::read, "ld.shared", site), bytes);
  log_shared_access(site, address, bytes);
}

void st_shared(uint32_t address, const void* in, int bytes) {
  const void* site = EMU_SITE;
  copy_small(in_shared(address, bytes, Access::write, "st.shared", site), in, bytes);
  log_shared_access(site, address, bytes);
}

void ld_global(uint64_t address, void* out, int bytes) {
  copy_small(out, in_global(address, bytes, Access::read, EMU_SITE), bytes);
}

void ld_global_nc(uint64_t address, void* out, int bytes) {
  const void* site = EMU_SITE;
  copy_small(out, in_global(address, bytes, Access::read, site), bytes);
  if (current_options.check && is_written_in_launch(address)) {
    report("global-race", site, "ld.global.nc of %s, which was written in this launch",
           place(address).c_str());
  }
}

void st_global(uint64_t address, const void* in, int bytes) {
  copy_small(in_global(address, bytes, Access::write, EMU_SITE), in, bytes);
}

void ld_generic(uint64_t address, void* out, int bytes) {
  copy_small(out, in_generic(address, bytes, Access::read, EMU_SITE), bytes);
}

void st_generic(uint64_t address, const void* in, int bytes) {
  copy_small(in_generic(address, bytes, Access::write, EMU_SITE), in, bytes);
}

void* atomic_shared(uint32_t address, int bytes) {
  return in_shared(address, bytes, Access::atomic, "atom.shared", EMU_SITE);
}

void* atomic_global(uint64_t address, int bytes) {
  return in_global(address, bytes, Access::atomic, EMU_SITE);
}

void* atomic_generic(uint64_t address, int bytes) {
  return in_generic(address, bytes, Access::atomic, EMU_SITE);
}

}  // namespace emu
