// The GPU instances of the attention forward on the emulator, launchers included, against float64:
//
//   emulate_attention [options of attention_driver.h]
//
// Three runs of each case, with the threads of a block in three orders. Wrong is also what the
// emulator reports, and an ldmatrix that meets a bank conflict.
#include <cstring>

#include "emulator/runtime/emulator.h"
#include "tests/emulated/attention_driver.h"

namespace anyflash::emulated {
namespace {

struct EmulatedMemory {
  static void* allocate(int64_t bytes) { return emu::global_malloc(static_cast<size_t>(bytes)); }
  static void release(void* data) { emu::global_free(data); }
  static void copy_in(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, bytes); }
  static void copy_out(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, bytes); }
};

class Emulator {
 public:
  static constexpr int64_t kRuns = 3;
  static constexpr bool kOrdersAdditions = true;

  std::string run(const Instance* instance, const fuzz::Problem& problem, bool deterministic,
                  int64_t number, int64_t run, fuzz::Results& results) {
    static constexpr emu::Order kOrders[] = {emu::Order::forward, emu::Order::reverse,
                                             emu::Order::random};
    emu::options().order = kOrders[run % 3];
    emu::options().seed = static_cast<uint64_t>(run);
    // By turns a GPU with little shared memory and one with much: tiles differ, and for how many
    // multiprocessors long keys are split. fp16 and bf16 begin with different ones.
    // sm_75 has one size of shared memory, and one block may have all of it.
    const bool large = (number + (instance->dtype == Dtype::bf16)) % 2 == 0;
    const bool turing = instance->min_sm < 80;
    emu::options().num_sms = large ? 80 : 20;
    emu::options().compute_capability = turing ? 75 : large ? 80 : 86;
    emu::options().smem_per_sm = (turing ? 64 : large ? 164 : 100) * 1024;
    emu::options().smem_limit = uint32_t(emu::options().smem_per_sm - (turing ? 0 : 1024));
    emu::options().l2_bytes = large ? 1 << 16 : 40 << 20;  // few pairs to a section, or many
    const int32_t error =
        Transfer<EmulatedMemory>(problem, results).run(instance, deterministic, results);
    const emu::Result result = emu::take_result();
    std::string wrong;
    if (error != 0) wrong = std::string(anyflash_error_string(error)) + "; ";
    if (!result.reports.empty()) wrong += result.text();
    const emu::Stats& stats = result.stats;
    if (stats.ldmatrix_wavefronts != stats.ldmatrix_ideal) {
      wrong += "ldmatrix took " + std::to_string(stats.ldmatrix_wavefronts) +
               " wavefronts instead of " + std::to_string(stats.ldmatrix_ideal) + "; ";
    }
    return wrong;
  }
};

}  // namespace
}  // namespace anyflash::emulated

int main(int argc, char** argv) {
  return anyflash::emulated::Driver<anyflash::emulated::Emulator>().main(argc, argv);
}
