#include "emulator/runtime/bulk_copy.h"

#include <algorithm>
#include <memory>

#include "emulator/runtime/async_copy.h"
#include "emulator/runtime/barrier.h"
#include "emulator/runtime/global_memory.h"
#include "emulator/runtime/report.h"
#include "emulator/runtime/shared_memory.h"

namespace emu {

namespace {

struct Operation {
  int rounds;  // until it happens
  std::function<void()> complete;
  const void* store;  // null for others
};

struct Store {
  Pieces pieces;
  Into into;
  std::vector<Clock> clock;
  bool complete = false;
};
using StorePointer = std::shared_ptr<Store>;

// Stores of one thread: not committed yet, and groups that it has not waited for.
struct Groups {
  std::vector<StorePointer> open;
  std::vector<std::vector<StorePointer>> committed;
};

std::vector<Operation> operations;  // under way, oldest first
std::vector<Groups> groups;         // per thread

// A copy engine acts after everything its issuer has done.
std::vector<Clock> engine_clock(int engine) {
  std::vector<Clock> clock(self->clock, self->clock + block.clock_width);
  clock[engine] = ++block.engines[engine - block.num_threads];
  return clock;
}

void track_pieces(const Pieces& pieces, Access in_shared, Access in_global, const Actor& actor,
                  const void* site) {
  for (const Piece& piece : pieces) {
    track_shared(piece.offset, kPieceBytes, in_shared, actor, site, Proxy::async);
    if (piece.begin == piece.end) continue;
    track_global(piece.global, piece.end - piece.begin, in_global, actor, site);
    static_cast<void>(*reinterpret_cast<const volatile unsigned char*>(piece.global));
  }
}

void load(const Piece& piece) {
  unsigned char value[kPieceBytes] = {};
  std::memcpy(value + piece.begin, reinterpret_cast<void*>(piece.global), piece.end - piece.begin);
  end_fill(piece.offset, value, kPieceBytes);
}

void store(const Piece& piece, Into into) {
  const unsigned char* from = shared_memory + piece.offset + piece.begin;
  void* to = reinterpret_cast<void*>(piece.global);
  const int bytes = piece.end - piece.begin;
  if (into == Into::global) {
    std::memcpy(to, from, bytes);
  } else {
    float sum[4], value[4];
    std::memcpy(sum, to, bytes);
    std::memcpy(value, from, bytes);
    for (int i = 0; i < bytes / 4; ++i) sum[i] += value[i];
    std::memcpy(to, sum, bytes);
  }
  end_drain(piece.offset, kPieceBytes);
}

void complete(Store& operation) {
  operation.complete = true;
  for (const Piece& piece : operation.pieces) store(piece, operation.into);
}

// Because a thread waits for it.
void complete_now(Store& operation) {
  if (operation.complete) return;
  const auto is_it = [&](const Operation& other) { return other.store == &operation; };
  operations.erase(std::find_if(operations.begin(), operations.end(), is_it));
  complete(operation);
}

void schedule(std::function<void()> complete, const Store* store) {
  const uint64_t longest = uint64_t(current_options.async_delay);
  operations.push_back({int(block.random() % (longest + 1)), std::move(complete), store});
}

}  // namespace

void complete_later(std::function<void()> complete) { schedule(std::move(complete), nullptr); }

bool advance_copies() {
  if (operations.empty()) return false;
  std::vector<Operation> now;
  std::vector<Operation> later;
  for (Operation& operation : operations) {
    (operation.rounds-- <= 0 ? now : later).push_back(std::move(operation));
  }
  operations = std::move(later);
  for (const Operation& operation : now) operation.complete();
  return true;
}

void issue_load(Pieces pieces, uint32_t mbarrier, const void* site) {
  ++result.stats.bulk_copies;
  check_mbarrier(mbarrier, site);
  const int engine = block.copy_engine(self->warp->index);
  std::vector<Clock> clock = engine_clock(engine);
  const Actor actor = {engine, clock.data()};
  // The asynchronous proxy has to see the initialised mbarrier.
  track_shared(mbarrier - kSharedBase, 8, Access::read, actor, site, Proxy::async);
  track_pieces(pieces, Access::write, Access::read, actor, site);
  for (const Piece& piece : pieces) begin_fill(piece.offset, kPieceBytes);
  complete_later([pieces = std::move(pieces), mbarrier, clock = std::move(clock)] {
    for (const Piece& piece : pieces) load(piece);
    mbarrier_complete_tx(mbarrier, uint32_t(pieces.size()) * kPieceBytes, clock.data());
  });
}

void issue_store(Pieces pieces, Into into, const void* site) {
  ++result.stats.bulk_copies;
  const int engine = block.copy_engine(self->warp->index);
  auto operation = std::make_shared<Store>(Store{std::move(pieces), into, engine_clock(engine)});
  const Access access = into == Into::global ? Access::write : Access::atomic;
  track_pieces(operation->pieces, Access::read, access, {engine, operation->clock.data()}, site);
  for (const Piece& piece : operation->pieces) begin_drain(piece.offset, kPieceBytes);
  groups[self->index].open.push_back(operation);
  schedule([operation] { complete(*operation); }, operation.get());
}

void bulk_commit() {
  Groups& mine = groups[self->index];
  mine.committed.push_back(std::move(mine.open));
  mine.open.clear();
}

void bulk_wait(int pending_groups) {
  auto& committed = groups[self->index].committed;
  while (int(committed.size()) > pending_groups) {
    for (const StorePointer& operation : committed.front()) {
      complete_now(*operation);
      join(self->clock, operation->clock.data());
    }
    committed.erase(committed.begin());
  }
}

// Reading and writing happen at once here, so one wait is as good as the other.
void bulk_wait_read(int pending_groups) { bulk_wait(pending_groups); }

void begin_block_copies() {
  operations.clear();
  groups.resize(block.num_threads);
  for (Groups& mine : groups) mine = {};
  begin_block_cp_async();
}

void end_thread_copies() {
  end_thread_cp_async();
  const Groups& mine = groups[self->index];
  bool waited = mine.open.empty();
  for (const auto& group : mine.committed) waited &= group.empty();
  if (!waited) report("in-flight", nullptr, "a thread exits with a bulk store it did not wait for");
}

void end_block_copies() {
  if (operations.empty()) return;
  report("in-flight", nullptr, "the block ends with a bulk copy under way");
}

}  // namespace emu
