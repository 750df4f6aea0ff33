// cp.async: the destination is NaN from the issue on and gets its value when the issuing thread
// waits for the group, which for everybody else is a write by that thread at that time.
#include "emulator/runtime/async_copy.h"
#include "emulator/runtime/barrier.h"
#include "emulator/runtime/global_memory.h"
#include "emulator/runtime/report.h"
#include "emulator/runtime/shared_memory.h"

namespace emu {

namespace {

constexpr int kMaxBytes = 16;

struct Copy {
  uint64_t source;
  uint32_t offset;  // in shared memory
  uint8_t bytes;
  uint8_t source_bytes;
  bool complete;
  Clock clock;  // of the cp.async.mbarrier.arrive that covers it, 0 if there is none
};

// Copies of one thread in the order of their issue. Indices count from the start of the block.
struct Queue {
  std::vector<Copy> copies;  // from number `first` on
  size_t first = 0;
  std::vector<size_t> groups;  // committed and not waited for: number of the copy behind the last
  size_t issued() const { return first + copies.size(); }
  size_t committed() const { return groups.empty() ? first : groups.back(); }
};

std::vector<Queue> queues;  // per thread

void complete(Copy& copy, int thread, Clock now) {
  if (copy.complete) return;
  unsigned char value[kMaxBytes] = {};
  std::memcpy(value, reinterpret_cast<void*>(copy.source), copy.source_bytes);
  end_fill_by(copy.offset, value, copy.bytes, thread, copy.clock ? copy.clock : now);
  copy.complete = true;
}

void complete_until(Queue& queue, size_t end, int thread, Clock now) {
  for (size_t i = queue.first; i < end; ++i) complete(queue.copies[i - queue.first], thread, now);
}

void forget_until(Queue& queue, size_t end) {
  queue.copies.erase(queue.copies.begin(), queue.copies.begin() + long(end - queue.first));
  queue.first = end;
}

void wait_for_groups(Queue& queue, size_t pending) {
  if (queue.groups.size() <= pending) return;
  const size_t done = queue.groups.size() - pending;
  const size_t end = queue.groups[done - 1];
  complete_until(queue, end, self->index, self->actor().now());
  forget_until(queue, end);
  queue.groups.erase(queue.groups.begin(), queue.groups.begin() + long(done));
}

}  // namespace

void begin_block_cp_async() {
  queues.resize(block.num_threads);
  for (Queue& queue : queues) {
    queue.copies.clear();
    queue.groups.clear();
    queue.first = 0;
  }
}

void end_thread_cp_async() {
  for (const Copy& copy : queues[self->index].copies) {
    if (copy.complete) continue;
    report("in-flight", nullptr, "a thread exits with cp.async it did not wait for");
    return;
  }
}

void cp_async(uint32_t shared, uint64_t global, int bytes, int source_bytes) {
  const void* site = EMU_SITE;
  ++result.stats.cp_async;
  const uint32_t offset = shared_offset(shared, bytes, bytes, "cp.async", site);
  if (global % uint64_t(bytes)) {
    EMU_FAIL("misaligned", site, "cp.async of %d bytes from global address %#lx", bytes,
             static_cast<unsigned long>(global));
  }
  if (source_bytes < 0 || source_bytes > bytes) {
    EMU_FAIL("out-of-bounds", site, "cp.async of %d bytes with %d source bytes", bytes,
             source_bytes);
  }
  if (source_bytes) {
    track_global(global, source_bytes, Access::read, self->actor(), site);
    // An unmapped source faults here, where it is named.
    static_cast<void>(*reinterpret_cast<const volatile unsigned char*>(global));
  }
  track_shared(offset, bytes, Access::write, self->actor(), site);
  begin_fill(offset, bytes);
  queues[self->index].copies.push_back(
      {global, offset, uint8_t(bytes), uint8_t(source_bytes), false, 0});
}

void cp_async_commit() {
  Queue& queue = queues[self->index];
  queue.groups.push_back(queue.issued());
}

void cp_async_wait(int pending_groups) {
  wait_for_groups(queues[self->index], size_t(pending_groups));
}

void cp_async_wait_all() {
  cp_async_commit();
  wait_for_groups(queues[self->index], 0);
}

void cp_async_mbarrier_arrive(uint32_t mbarrier, bool noinc) {
  const void* site = EMU_SITE;
  check_mbarrier(mbarrier, site);
  if (!noinc) mbarrier_add_pending(mbarrier, site);
  const int index = self->index;
  const Clock now = self->actor().now();
  Queue& queue = queues[index];
  for (Copy& copy : queue.copies) {
    if (copy.clock == 0) copy.clock = now;
  }
  const size_t end = queue.issued();
  std::vector<Clock> clock(self->clock, self->clock + block.clock_width);
  self->tick();
  complete_later([=] {
    Queue& queue = queues[index];
    complete_until(queue, std::max(end, queue.first), index, now);
    mbarrier_arrive_by_copy(mbarrier, clock.data());
  });
}

}  // namespace emu
