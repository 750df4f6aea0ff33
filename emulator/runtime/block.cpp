#include "emulator/runtime/block.h"

#include <algorithm>
#include <map>

#include "emulator/runtime/async_copy.h"
#include "emulator/runtime/bank_conflicts.h"
#include "emulator/runtime/barrier.h"
#include "emulator/runtime/collectives.h"
#include "emulator/runtime/report.h"
#include "emulator/runtime/shared_memory.h"
#include "emulator/runtime/wgmma.h"

namespace emu {

Block block;
Thread* self = nullptr;
Scheduler scheduler;
ThreadRegisters regs;

namespace {

constexpr int kUnlimited = 1 << 30;

void run_warp(Warp& warp) {
  scheduler.turns = scheduler.order == Order::random ? int(block.random() % 64) : kUnlimited;
  const int before_first = scheduler.order == Order::reverse ? 0 : 31;
  resume(block.threads[warp.index * 32 + next_lane(warp.runnable, before_first)], &scheduler.stack);
  self = nullptr;
}

void thread_main() {
  (*block.kernel)();
  end_thread_copies();
  end_thread_wgmma();
  --block.live;
  Warp& warp = *self->warp;
  warp.live &= ~(1u << self->lane);
  warp.runnable &= ~(1u << self->lane);
  end_lane_meetings(warp);
  while (true) leave_to_scheduler();
}

void begin_block() {
  block.live = block.num_threads;
  block.stopped = false;
  std::fill(block.clocks.begin(), block.clocks.end(), block.epoch);
  std::fill(block.engines.begin(), block.engines.end(), block.epoch);
  for (Thread& thread : block.threads) {
    thread.stack = prepare_stack(thread.index, thread_main);
    thread.tick();
  }
  for (Warp& warp : block.warps) {
    warp.live = warp.runnable = ~0u;
    warp.open = 0;
    for (Meeting& meeting : warp.meetings) meeting.arrived = 0;
  }
  begin_block_shared_memory();
  begin_block_bank_conflicts();
  begin_block_barriers();
  begin_block_mbarriers();
  begin_block_copies();
  begin_block_wgmma();
}

void end_block() {
  if (!block.stopped) end_block_copies();
  for (Warp& warp : block.warps) count_bank_conflicts(warp);
  Clock latest = block.epoch + 1;
  for (const Thread& thread : block.threads) latest = std::max(latest, thread.actor().now());
  for (const Clock clock : block.engines) latest = std::max(latest, clock);
  block.epoch = latest;
}

void report_deadlock() {
  std::map<std::string, int> waiting;
  for (const Thread& thread : block.threads) {
    if (!(thread.warp->live >> thread.lane & 1)) continue;
    std::string what = thread.waits_for;
    if (thread.waits_for_number >= 0) what += " " + std::to_string(thread.waits_for_number);
    ++waiting[what + " at " + source_lines(thread.waits_at)];
  }
  std::string text;
  for (const auto& [what, count] : waiting) {
    text += (text.empty() ? "" : "; ") + std::to_string(count) + " threads wait for " + what;
  }
  const int exited = block.num_threads - block.live;
  if (exited > 0) text += "; " + std::to_string(exited) + " have exited";
  EMU_FAIL("deadlock", nullptr, "%s", text.c_str());
}

}  // namespace

void pause() {
  ++result.stats.switches;
  leave_to_scheduler();
}

void stop() {
  block.stopped = true;
  while (self) leave_to_scheduler();
}

std::string Block::actor_name(int actor) const {
  if (actor < num_threads) return "thread " + std::to_string(actor);
  actor -= num_threads;
  if (actor < num_warps) return "a bulk copy of warp " + std::to_string(actor);
  return "wgmma of warpgroup " + std::to_string(actor - num_warps);
}

void Block::shape(const char* name, Dim3 size, uint32_t bytes,
                  const std::function<void()>& function) {
  kernel_name = name;
  kernel = &function;
  num_threads = int(size.x * size.y * size.z);
  num_warps = num_threads / 32;
  num_warpgroups = (num_threads + 127) / 128;
  num_actors = num_threads + num_warps + num_warpgroups;
  clock_width = (num_actors + 15) / 16 * 16;
  shared_bytes = bytes;
  launch_epoch = epoch;
  threads.resize(size_t(num_threads));
  warps.resize(size_t(num_warps));
  clocks.resize(size_t(num_threads) * clock_width);
  engines.resize(size_t(num_warps) + num_warpgroups);
  for (int i = 0; i < num_warps; ++i) warps[i].index = i;
  for (int i = 0; i < num_threads; ++i) {
    const uint32_t x = uint32_t(i);
    threads[i].index = i;
    threads[i].lane = i % 32;
    threads[i].warp = &warps[i / 32];
    threads[i].tid = {x % size.x, x / size.x % size.y, x / (size.x * size.y)};
    threads[i].clock = &clocks[size_t(i) * clock_width];
  }
  shape_shared_memory();
}

void Block::run() {
  scheduler.order = current_options.order;
  begin_block();
  std::vector<int> order(num_warps);
  for (int i = 0; i < num_warps; ++i) order[i] = i;
  if (scheduler.order == Order::reverse) std::reverse(order.begin(), order.end());
  while (live > 0 && !stopped) {
    bool progress = false;
    if (scheduler.order == Order::random) std::shuffle(order.begin(), order.end(), random);
    for (const int i : order) {
      if (!warps[i].runnable) continue;
      progress = true;
      run_warp(warps[i]);
      if (stopped) break;
    }
    if (stopped) break;
    progress |= advance_copies();
    if (!progress && live > 0 && !stopped) report_deadlock();
  }
  end_block();
}

}  // namespace emu
