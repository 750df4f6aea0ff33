// bar.sync, bar.arrive, bar.red.
#include "emulator/runtime/barrier.h"

#include "emulator/runtime/bank_conflicts.h"
#include "emulator/runtime/report.h"

namespace emu {

namespace {

constexpr int kNumBarriers = 16;

struct Barrier {
  int expected = 0;
  std::vector<Thread*> arrived;
  std::vector<Thread*> waiting;
  std::vector<Clock> clock;       // joined over the arrivals
  std::vector<const void*> site;  // of each warp's first arrival, null if it has none
  int votes = 0;                  // true predicates of bar.red
};

Barrier barriers[kNumBarriers];
std::vector<int> answers;  // of bar.red, per thread

int thread_count(int id, int threads, const void* site) {
  if (threads == kWholeBlock) threads = block.num_threads;
  if (id < 0 || id >= kNumBarriers || threads <= 0 || threads % 32 || threads > block.num_threads) {
    EMU_FAIL("barrier", site, "barrier %d for %d threads in a block of %d", id, threads,
             block.num_threads);
  }
  return threads;
}

void check_arrival(const Barrier& barrier, int id, int threads, const void* site) {
  if (barrier.expected != threads) {
    EMU_FAIL("barrier", site, "barrier %d for %d threads, which others entered for %d", id, threads,
             barrier.expected);
  }
  const void* others = barrier.site[self->warp->index];
  if (others && others != site) {
    EMU_FAIL("divergence", site,
             "lanes of warp %d enter barrier %d in different places, others at %s",
             self->warp->index, id, source_lines(others).c_str());
  }
}

void complete(Barrier& barrier) {
  ++result.stats.barriers;
  for (Thread* thread : barrier.arrived) answers[thread->index] = barrier.votes;
  for (Thread* thread : barrier.waiting) {
    join(thread->clock, barrier.clock.data());
    wake(*thread);
    if (thread->lane == 0) count_bank_conflicts(*thread->warp);
  }
  barrier.arrived.clear();
  barrier.waiting.clear();
}

void enter(int id, int threads, bool waits, bool predicate, const void* site) {
  threads = thread_count(id, threads, site);
  Barrier& barrier = barriers[id];
  if (barrier.arrived.empty()) {
    barrier.expected = threads;
    barrier.clock.assign(block.clock_width, 0);
    barrier.site.assign(block.num_warps, nullptr);
    barrier.votes = 0;
  }
  check_arrival(barrier, id, threads, site);
  barrier.site[self->warp->index] = site;
  barrier.arrived.push_back(self);
  barrier.votes += predicate;
  join(barrier.clock.data(), self->clock);
  self->tick();
  if (waits) barrier.waiting.push_back(self);
  if (int(barrier.arrived.size()) == barrier.expected) {
    complete(barrier);
  } else if (waits) {
    wait("barrier", id, site);
  }
}

}  // namespace

void begin_block_barriers() {
  for (Barrier& barrier : barriers) {
    barrier.arrived.clear();
    barrier.waiting.clear();
  }
  answers.resize(block.num_threads);
}

void barrier_sync(int id, int threads) { enter(id, threads, true, false, EMU_SITE); }

void barrier_arrive(int id, int threads) { enter(id, threads, false, false, EMU_SITE); }

bool barrier_reduce_and(int id, int threads, bool predicate) {
  enter(id, threads, true, !predicate, EMU_SITE);
  return answers[self->index] == 0;
}

bool barrier_reduce_or(int id, int threads, bool predicate) {
  enter(id, threads, true, predicate, EMU_SITE);
  return answers[self->index] != 0;
}

uint32_t barrier_reduce_popc(int id, int threads, bool predicate) {
  enter(id, threads, true, predicate, EMU_SITE);
  return uint32_t(answers[self->index]);
}

}  // namespace emu
