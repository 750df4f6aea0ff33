// wgmma.mma_async. The 128 threads of a warpgroup meet and the product is computed at once, because
// nvcc copies the accumulators between the issue and the wait. The shared operands count as being
// read by the warpgroup's matrix engine until wgmma.wait_group.
//
// Operand descriptors: PTX ISA, "Matrix descriptor format". Fragments of the accumulator: thread t
// has rows 16 (t / 32) + t % 32 / 4 and 8 below, columns 8 j + 2 (t % 4) and the next, in registers
// 4 j to 4 j + 3; fragments of A as in mma.m16n8k16, warp by warp.
#include "emulator/runtime/wgmma.h"

#include <algorithm>

#include "emulator/runtime/collectives.h"
#include "emulator/runtime/products.h"
#include "emulator/runtime/report.h"
#include "emulator/runtime/shared_memory.h"
#include "emulator/runtime/swizzle.h"

namespace emu {

namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;
constexpr int kDepth = 16;  // k of one instruction
constexpr int kMaxColumns = 256;
constexpr uint32_t kChunkBytes = 16;  // of an operand in shared memory
constexpr int kRegistersPerSm = 65536;

struct Product {
  std::vector<uint32_t> chunks;  // of shared memory, read until somebody waits
  Clock clock;                   // of the matrix engine
};

struct Warpgroup {
  // The meeting.
  int arrived = 0;
  WgmmaOperands operands;
  int n;
  float* d[kThreads];
  const uint32_t* a[kThreads];
  std::vector<Thread*> waiting;

  std::vector<Product> products;  // since the block began
  size_t released = 0;            // of them, those that no longer read shared memory
  int registers = 0;              // setmaxnreg
};

struct Issued {
  size_t products = 0;
  size_t waited = 0;
  std::vector<size_t> groups;  // committed: products issued until then
  bool fenced = false;
};

std::vector<Warpgroup> warpgroups;
std::vector<Issued> issued;  // per thread

Warpgroup& my_warpgroup() { return warpgroups[self->index / kThreads]; }

// ---- operands in shared memory ----

struct Descriptor {
  uint32_t start, leading, stride;  // bytes
  uint32_t swizzle;

  explicit Descriptor(uint64_t bits)
      : start(field(bits, 0)), leading(field(bits, 16)), stride(field(bits, 32)) {
    constexpr uint32_t kSwizzles[] = {0, 128, 64, 32};
    swizzle = kSwizzles[bits >> 62];
  }
  static uint32_t field(uint64_t bits, int shift) { return uint32_t(bits >> shift & 0x3FFF) << 4; }

  // Shared address of element k of row i (A) or column i (B). Transposed: MN-major.
  uint32_t address(int i, int k, bool transposed) const {
    const uint32_t row = uint32_t(i);
    const uint32_t depth = uint32_t(k);
    if (swizzle == 0) {  // core matrices of 8 x 16 bytes
      const uint32_t inside =
          transposed ? row % 8 * 2 + depth % 8 * 16 : row % 8 * 16 + depth % 8 * 2;
      return start + row / 8 * stride + depth / 8 * leading + inside;
    }
    const uint32_t width = swizzle / 2;  // elements of a swizzled row
    const uint32_t linear = transposed ? row % width * 2 + row / width * leading +
                                             depth % 8 * swizzle + depth / 8 * stride
                                       : row % 8 * swizzle + row / 8 * stride + depth * 2;
    return swizzled(start + linear, swizzle);
  }
};

// Calls visit(i, k, address) for the 16-byte chunks of an operand of `rows` rows; i and k are those
// of a chunk's first element, the others follow in k (in i if transposed).
template <typename Visit>
void for_each_chunk(uint64_t bits, int rows, bool transposed, Visit&& visit) {
  const Descriptor descriptor(bits);
  for (int i = 0; i < rows; i += transposed ? 8 : 1) {
    for (int k = 0; k < kDepth; k += transposed ? 1 : 8) {
      visit(i, k, descriptor.address(i, k, transposed));
    }
  }
}

void read_operand(Product& product, const Actor& engine, uint64_t bits, int rows, bool transposed,
                  const void* site) {
  for_each_chunk(bits, rows, transposed, [&](int, int, uint32_t address) {
    const uint32_t offset = shared_offset(address, kChunkBytes, kChunkBytes, "wgmma operand", site);
    track_shared(offset, kChunkBytes, Access::read, engine, site, Proxy::async);
    begin_drain(offset, kChunkBytes);
    product.chunks.push_back(offset);
  });
}

// Calls place(i, k, value) for every element of an operand.
template <Type16 kType, typename Place>
void load_operand(uint64_t bits, int rows, bool transposed, Place&& place) {
  for_each_chunk(bits, rows, transposed, [&](int i, int k, uint32_t address) {
    uint16_t chunk[8];
    std::memcpy(chunk, shared_memory + address - kSharedBase, sizeof chunk);
    for (int e = 0; e < 8; ++e) {
      place(transposed ? i + e : i, transposed ? k : k + e, to_fp32<kType>(chunk[e]));
    }
  });
}

template <Type16 kType, typename Place>
void load_fragments(const uint32_t* const (&registers)[kThreads], Place&& place) {
  for (int t = 0; t < kThreads; ++t) {
    for (int r = 0; r < 4; ++r) {
      const int row = t / 32 * 16 + t % 32 / 4 + r % 2 * 8;
      const int column = t % 4 * 2 + r / 2 * 8;
      place(row, column, to_fp32<kType>(uint16_t(registers[t][r])));
      place(row, column + 1, to_fp32<kType>(uint16_t(registers[t][r] >> 16)));
    }
  }
}

// Calls visit(thread, register, row, column) for pairs of accumulators.
template <typename Visit>
void for_each_pair(int n, Visit&& visit) {
  for (int t = 0; t < kThreads; ++t) {
    for (int r = 0; r < n / 2; r += 2) {
      visit(t, r, t / 32 * 16 + t % 32 / 4 + r % 4 / 2 * 8, r / 4 * 8 + t % 4 * 2);
    }
  }
}

template <Type16 kType>
void multiply(const Warpgroup& group) {
  static float a[kRows][2][kDepth / 2];  // even and odd k
  static PairRow b[kMaxColumns / 8][kDepth / 2];
  alignas(32) static float d[kRows][kMaxColumns];
  const WgmmaOperands& operands = group.operands;
  const float sign = operands.negate_a != operands.negate_b ? -1.f : 1.f;
  const auto place_a = [&](int i, int k, float value) { a[i][k % 2][k / 2] = sign * value; };
  if (operands.a) {
    load_fragments<kType>(group.a, place_a);
  } else {
    load_operand<kType>(operands.a_descriptor, kRows, operands.a_transposed, place_a);
  }
  load_operand<kType>(operands.b_descriptor, group.n, operands.b_transposed,
                      [&](int j, int k, float value) {
                        PairRow& row = b[j / 8][k / 2];
                        (k % 2 ? row.odd : row.even)[j % 8 / kWidth][j % kWidth] = value;
                      });
  for_each_pair(group.n, [&](int t, int r, int row, int column) {
    d[row][column] = operands.scale_d ? group.d[t][r] : 0.f;
    d[row][column + 1] = operands.scale_d ? group.d[t][r + 1] : 0.f;
  });
  for (int row = 0; row < kRows; ++row) {
    for (int j = 0; j < group.n; j += 8) {
      add_products<kDepth / 2>(d[row] + j, a[row][0], a[row][1], b[j / 8]);
    }
  }
  for_each_pair(group.n, [&](int t, int r, int row, int column) {
    std::memcpy(&group.d[t][r], &d[row][column], 8);
  });
}

// ---- the meeting ----

bool same_operands(const WgmmaOperands& x, const WgmmaOperands& y) {
  return x.a_descriptor == y.a_descriptor && x.b_descriptor == y.b_descriptor && !x.a == !y.a &&
         x.scale_d == y.scale_d && x.negate_a == y.negate_a && x.negate_b == y.negate_b &&
         x.a_transposed == y.a_transposed && x.b_transposed == y.b_transposed && x.type == y.type;
}

void issue(Warpgroup& group, int index, const void* site) {
  ++result.stats.wgmma;
  const int engine = block.matrix_engine(index);
  std::vector<Clock> clock(self->clock, self->clock + block.clock_width);
  clock[engine] = ++block.engines[engine - block.num_threads];
  const Actor actor = {engine, clock.data()};
  Product product;
  product.clock = actor.now();
  const WgmmaOperands& operands = group.operands;
  if (!operands.a) {
    read_operand(product, actor, operands.a_descriptor, kRows, operands.a_transposed, site);
  }
  read_operand(product, actor, operands.b_descriptor, group.n, operands.b_transposed, site);
  if (operands.type == Type16::f16) {
    multiply<Type16::f16>(group);
  } else {
    multiply<Type16::bf16>(group);
  }
  group.products.push_back(std::move(product));
}

}  // namespace

void wgmma(float* d, int n, const WgmmaOperands& operands) {
  const void* site = EMU_SITE;
  const int index = self->index / kThreads;
  Warpgroup& group = my_warpgroup();
  if (!issued[self->index].fenced) {
    report("wgmma-fence", site, "no wgmma.fence since the accumulators were last used");
  }
  if (group.arrived == 0) {
    group.operands = operands;
    group.n = n;
  } else if (group.n != n || !same_operands(group.operands, operands)) {
    EMU_FAIL("divergence", site, "threads of warpgroup %d disagree about wgmma", index);
  }
  group.d[self->index % kThreads] = d;
  group.a[self->index % kThreads] = operands.a;
  ++issued[self->index].products;
  if (++group.arrived < kThreads) {
    group.waiting.push_back(self);
    return wait("wgmma of warpgroup", index, site);
  }
  issue(group, index, site);
  group.arrived = 0;
  for (Thread* thread : group.waiting) wake(*thread);
  group.waiting.clear();
}

void wgmma_fence() { issued[self->index].fenced = true; }

void wgmma_commit() {
  Issued& mine = issued[self->index];
  mine.groups.push_back(mine.products);
}

void wgmma_wait(int pending_groups) {
  const void* site = EMU_SITE;
  Warpgroup& group = my_warpgroup();
  Issued& mine = issued[self->index];
  const size_t pending = size_t(pending_groups);
  if (pending == 0) {
    const size_t committed = mine.groups.empty() ? mine.waited : mine.groups.back();
    if (committed < mine.products) report("wgmma", site, "waits for wgmma that is not committed");
    mine.fenced = false;
  }
  if (mine.groups.size() <= pending) return;
  const size_t done = mine.groups.size() - pending;
  mine.waited = mine.groups[done - 1];
  mine.groups.erase(mine.groups.begin(), mine.groups.begin() + long(done));
  for (; group.released < mine.waited; ++group.released) {
    for (const uint32_t offset : group.products[group.released].chunks) {
      end_drain(offset, kChunkBytes);
    }
    group.products[group.released].chunks = {};
  }
  const int engine = block.matrix_engine(self->index / kThreads);
  if (mine.waited == 0) return;
  const Clock known = group.products[mine.waited - 1].clock;
  self->clock[engine] = std::max(self->clock[engine], known);
}

void setmaxnreg(int count) {
  const void* site = EMU_SITE;
  if (count % 8 || count < 24 || count > 256) report("setmaxnreg", site, "%d registers", count);
  my_warpgroup().registers = count;
  int total = 0;
  for (const Warpgroup& group : warpgroups) {
    if (group.registers == 0) return;  // not known yet
    total += group.registers * kThreads;
  }
  if (total > kRegistersPerSm) report("setmaxnreg", site, "%d registers in all", total);
}

void begin_block_wgmma() {
  warpgroups.assign(block.num_warpgroups, {});
  issued.assign(block.num_threads, {});
}

void end_thread_wgmma() {
  const Issued& mine = issued[self->index];
  if (mine.waited == mine.products) return;
  report("in-flight", nullptr, "a thread exits with wgmma it did not wait for");
}

}  // namespace emu
