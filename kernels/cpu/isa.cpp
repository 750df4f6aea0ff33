// The instruction set of this CPU.
#include <initializer_list>

#include "kernels/arch.h"
#include "kernels/launch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// What CPUID and XGETBV say. They are read here, not by __builtin_cpu_supports: the runtime library
// of zig's compiler leaves empty what that looks at.
struct Cpu {
  uint32_t leaf1_ecx = 0, leaf7_ebx = 0, leaf7_edx = 0, leaf7_1_eax = 0;
  uint32_t saved = 0;  // the registers that the system keeps for each thread

  Cpu() {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0) leaf1_ecx = ecx;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0) {
      leaf7_ebx = ebx;
      leaf7_edx = edx;
      // Leaf 7 has as many parts as its first EAX says.
      if (eax >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0) leaf7_1_eax = eax;
    }
    if (has(leaf1_ecx, {27})) {  // OSXSAVE: there is an XGETBV
      __asm__ volatile("xgetbv" : "=a"(saved), "=d"(edx) : "c"(0));
    }
  }

  // Whether a word has all these bits.
  static bool has(uint32_t word, std::initializer_list<int> bits) {
    for (int bit : bits) {
      if ((word >> bit & 1) == 0) return false;
    }
    return true;
  }

  // Linux keeps tiles for a process that asks first: they take 8 KiB of every thread that uses
  // them, and of an alternate signal stack; where one is too small for that, it refuses. (Linux,
  // Documentation/arch/x86/xstate.rst)
  static bool may_use_tiles() {
#if defined(__linux__)
    constexpr long kRequest = 0x1023, kTiles = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTiles) == 0;
#else
    return false;
#endif
  }

  bool avx2() const {
    return has(saved, {1, 2})               // XMM, YMM
           && has(leaf1_ecx, {12, 28, 29})  // FMA, AVX, F16C
           && has(leaf7_ebx, {5});          // AVX2
  }
  bool avx512() const {
    return avx2() && has(saved, {5, 6, 7})       // masks, ZMM
           && has(leaf7_ebx, {16, 17, 30, 31});  // F, DQ, BW, VL
  }
  bool avx512bf16() const { return avx512() && has(leaf7_1_eax, {5}); }
  bool amx() const {
    return avx512bf16() && has(saved, {17, 18})  // tiles' shapes, tiles
           && has(leaf7_edx, {22, 24})           // AMX-BF16, AMX-TILE
           && may_use_tiles();
  }
};

}  // namespace
#endif

int32_t anyflash_cpu_isa(void) {
  namespace Isa = anyflash::Isa;
#if defined(__x86_64__)
  const Cpu cpu;
  if (cpu.amx()) return Isa::amx;
  if (cpu.avx512bf16()) return Isa::avx512bf16;
  if (cpu.avx512()) return Isa::avx512;
  return cpu.avx2() ? Isa::avx2 : Isa::none;
#elif defined(__aarch64__)
  return Isa::neon;
#else
  return Isa::none;
#endif
}
