// The block that runs: its threads, their vector clocks, and how they wait and go on.
//
// clock[i] of an actor says how much of actor i's past happened before the actor's present. Actors
// are the threads, then one copy engine per warp, then one matrix engine per warpgroup. Clocks
// never go back, not even from block to block: whatever an earlier block left in a shadow is older
// than `block.epoch`, hence before everything, and need not be erased.
#pragma once

#include <functional>
#include <random>
#include <vector>

#include "emulator/runtime/emulator.h"
#include "emulator/runtime/fiber.h"
#include "emulator/runtime/report.h"

namespace emu {

using Clock = uint32_t;

struct Actor {
  int index;
  const Clock* clock;
  Clock now() const { return clock[index]; }
  bool is_after(int other, Clock then) const { return clock[other] >= then; }
};

struct Warp;

struct Thread {
  StackPointer stack;
  int index;
  int lane;
  Warp* warp;
  Dim3 tid;
  Clock* clock;
  // For the report of a deadlock.
  const char* waits_for;
  int waits_for_number;
  const void* waits_at;

  Actor actor() const { return {index, clock}; }
  void tick() { ++clock[index]; }  // after a release: what follows is not covered by it
};

// What a lane shows the others in a warp instruction.
struct Exchange {
  const void* in[2];
  void* out;
  uint64_t value;
  uint32_t number;
  uint32_t answer;
};

// Lanes that came to a warp instruction and those they wait for.
struct Meeting {
  uint32_t mask;
  uint32_t arrived = 0;
  uint32_t turn = 0;  // how many meetings took place here
  int instruction;
  const void* site;
};

struct Warp {
  int index;
  uint32_t live;      // lanes that have not exited
  uint32_t runnable;  // lanes that do not wait
  uint32_t open;      // meetings to which not all lanes have come
  Exchange exchange[32];
  Meeting meetings[32];
};

struct Block {
  const char* kernel_name = "";
  const std::function<void()>* kernel = nullptr;
  int num_threads = 0;
  int num_warps = 0;
  int num_warpgroups = 0;
  int num_actors = 0;
  uint32_t shared_bytes = 0;

  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Clock> clocks;   // of the threads, clock_width each
  int clock_width = 0;         // num_actors rounded up, for vector instructions
  std::vector<Clock> engines;  // what the copy and matrix engines have begun
  Clock launch_epoch = 0;      // the clock when the launch began
  Clock epoch = 0;             // when the block began

  std::mt19937_64 random;
  int live = 0;          // threads that have not exited
  bool stopped = false;  // after an error that leaves nothing sensible to do

  int copy_engine(int warp) const { return num_threads + warp; }
  int matrix_engine(int warpgroup) const { return num_threads + num_warps + warpgroup; }
  std::string actor_name(int actor) const;

  void shape(const char* name, Dim3 size, uint32_t shared_bytes,
             const std::function<void()>& kernel);
  void run();  // block regs.ctaid
};

extern Options current_options;
extern Block block;
extern Thread* self;  // null while no thread runs

inline void join(Clock* clock, const Clock* other) {
  const int width = block.clock_width;
  for (int i = 0; i < width; ++i) clock[i] = clock[i] > other[i] ? clock[i] : other[i];
}

// ---- switching ----

struct Scheduler {
  StackPointer stack;
  Order order;
  int turns;  // switches left before another warp gets its chance
};
extern Scheduler scheduler;

// The next lane of a warp in the order of the options, after `lane`.
inline int next_lane(uint32_t runnable, int lane) {
  if (scheduler.order == Order::reverse) {
    const uint32_t below = runnable & ((1u << lane) - 1);
    return 31 - __builtin_clz(below ? below : runnable);
  }
  if (scheduler.order == Order::random) lane = int(block.random() % 32);
  const uint32_t above = runnable & ~((2u << lane) - 1);
  return __builtin_ctz(above ? above : runnable);
}

inline void resume(Thread& thread, StackPointer* from) {
  self = &thread;
  regs.tid = thread.tid;
  regs.thread = uint32_t(thread.index);
  emu_switch(from, thread.stack);
}

inline void leave_to_scheduler() { emu_switch(&self->stack, scheduler.stack); }

// Lets others run until somebody wakes this thread; the rest is what a deadlock report says.
inline void wait(const char* what, int number, const void* site) {
  self->waits_for = what;
  self->waits_for_number = number;
  self->waits_at = site;
  Warp& warp = *self->warp;
  warp.runnable &= ~(1u << self->lane);
  ++result.stats.switches;
  if (!warp.runnable || scheduler.turns-- <= 0) return leave_to_scheduler();
  resume(block.threads[warp.index * 32 + next_lane(warp.runnable, self->lane)], &self->stack);
}

inline void wake(Thread& thread) { thread.warp->runnable |= 1u << thread.lane; }

// Lets every other warp run.
void pause();
// Ends the launch. In a thread it does not return.
void stop();
// The same after a report.
#define EMU_FAIL(...)    \
  do {                   \
    report(__VA_ARGS__); \
    stop();              \
  } while (false)

}  // namespace emu
