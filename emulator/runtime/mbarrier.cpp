// mbarrier objects. What lies in shared memory is only their place; the state is here.
#include <map>

#include "emulator/runtime/barrier.h"
#include "emulator/runtime/report.h"
#include "emulator/runtime/shared_memory.h"

namespace emu {

namespace {

constexpr uint32_t kBytes = 8;
constexpr uint32_t kMaxCount = (1 << 20) - 1;
constexpr int kMaxPolls = 1000000;

struct Mbarrier {
  uint32_t count = 0;   // arrivals that complete a phase
  int64_t pending = 0;  // arrivals missing in this phase
  int64_t bytes = 0;    // bytes missing in this phase
  uint32_t phase = 0;
  std::vector<Clock> clock;                           // joined over the arrivals of this phase
  std::vector<Clock> done;                            // of the last complete phase
  std::vector<std::pair<Thread*, uint32_t>> waiting;  // for the phase of this parity
};

std::map<uint32_t, Mbarrier> mbarriers;  // by address
std::vector<int> polls;                  // per thread, in vain and without a pause

Mbarrier& find(uint32_t address, const void* site) {
  const auto entry = mbarriers.find(address);
  if (entry != mbarriers.end()) return entry->second;
  EMU_FAIL("mbarrier", site, "no mbarrier was initialised at shared byte %d",
           int(address - kSharedBase));
  static Mbarrier none;
  return none;
}

// Accesses count as reads of the object: the initialisation has to come before them.
Mbarrier& use(uint32_t address, const void* site) {
  const uint32_t offset = shared_offset(address, kBytes, kBytes, "mbarrier", site);
  track_shared(offset, kBytes, Access::read, self->actor(), site);
  return find(address, site);
}

bool is_complete(const Mbarrier& mbarrier, uint32_t parity) {
  return (mbarrier.phase & 1) != (parity & 1);
}

void wake_waiting(Mbarrier& mbarrier) {
  auto waiting = std::move(mbarrier.waiting);
  mbarrier.waiting.clear();
  for (const auto& [thread, parity] : waiting) {
    if (is_complete(mbarrier, parity)) {
      join(thread->clock, mbarrier.done.data());
      wake(*thread);
    } else {
      mbarrier.waiting.push_back({thread, parity});
    }
  }
}

void arrive(Mbarrier& mbarrier, int64_t arrivals, const Clock* clock, const void* site) {
  join(mbarrier.clock.data(), clock);
  mbarrier.pending -= arrivals;
  if (mbarrier.pending < 0) {
    EMU_FAIL("mbarrier", site, "more arrivals than its count of %u", mbarrier.count);
    return;
  }
  if (mbarrier.pending > 0 || mbarrier.bytes != 0) return;
  ++mbarrier.phase;
  mbarrier.pending = mbarrier.count;
  mbarrier.done = mbarrier.clock;
  mbarrier.clock.assign(block.clock_width, 0);
  wake_waiting(mbarrier);
}

}  // namespace

void begin_block_mbarriers() {
  mbarriers.clear();
  polls.assign(block.num_threads, 0);
}

void check_mbarrier(uint32_t address, const void* site) { find(address, site); }

void mbarrier_init(uint32_t address, uint32_t count) {
  const void* site = EMU_SITE;
  const uint32_t offset = shared_offset(address, kBytes, kBytes, "mbarrier.init", site);
  if (count == 0 || count > kMaxCount) report("mbarrier", site, "count %u", count);
  track_shared(offset, kBytes, Access::write, self->actor(), site);
  Mbarrier mbarrier;
  mbarrier.count = count;
  mbarrier.pending = count;
  mbarrier.clock.assign(block.clock_width, 0);
  mbarrier.done.assign(block.clock_width, 0);
  mbarriers[address] = std::move(mbarrier);
}

void mbarrier_inval(uint32_t address) {
  const void* site = EMU_SITE;
  const Mbarrier& mbarrier = use(address, site);
  track_shared(address - kSharedBase, kBytes, Access::write, self->actor(), site);
  if (!mbarrier.waiting.empty()) report("mbarrier", site, "invalidated while threads wait for it");
  mbarriers.erase(address);
}

void mbarrier_expect_tx(uint32_t address, uint32_t bytes) { use(address, EMU_SITE).bytes += bytes; }

void mbarrier_arrive(uint32_t address, uint32_t count) {
  const void* site = EMU_SITE;
  arrive(use(address, site), count, self->clock, site);
  self->tick();
}

void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes) {
  const void* site = EMU_SITE;
  Mbarrier& mbarrier = use(address, site);
  mbarrier.bytes += bytes;
  arrive(mbarrier, 1, self->clock, site);
  self->tick();
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  const void* site = EMU_SITE;
  Mbarrier& mbarrier = use(address, site);
  if (is_complete(mbarrier, parity)) return join(self->clock, mbarrier.done.data());
  mbarrier.waiting.push_back({self, parity});
  wait("the mbarrier at shared byte", int(address - kSharedBase), site);
}

bool mbarrier_test_wait(uint32_t address, uint32_t parity) {
  const void* site = EMU_SITE;
  Mbarrier& mbarrier = use(address, site);
  if (is_complete(mbarrier, parity)) {
    join(self->clock, mbarrier.done.data());
    polls[self->index] = 0;
    return true;
  }
  if (++polls[self->index] > kMaxPolls) {
    EMU_FAIL("deadlock", site, "polls the mbarrier at shared byte %d for ever",
             int(address - kSharedBase));
  }
  pause();
  return false;
}

void mbarrier_complete_tx(uint32_t address, uint32_t bytes, const Clock* clock) {
  Mbarrier& mbarrier = find(address, nullptr);
  if (block.stopped) return;
  mbarrier.bytes -= bytes;
  arrive(mbarrier, 0, clock, nullptr);
}

void mbarrier_arrive_by_copy(uint32_t address, const Clock* clock) {
  Mbarrier& mbarrier = find(address, nullptr);
  if (!block.stopped) arrive(mbarrier, 1, clock, nullptr);
}

void mbarrier_add_pending(uint32_t address, const void* site) { ++use(address, site).pending; }

}  // namespace emu
