// A GPU in slow motion: runs CUDA kernels on the CPU, thread by thread, and reports what they do
// wrong. Kernels come as C++ translated from the PTX that nvcc emitted (ptx_to_cpp), so what runs
// is what ships, inline assembly included. Every CUDA thread is a fiber; one OS thread runs them.
// Blocks of a grid run one after another, warps and lanes in the order Options asks for, and a
// switch happens only where a thread waits. What is checked is therefore not a lucky interleaving
// but the happens-before relation, with vector clocks.
//
// Reported (Report::kind), each with kernel, block, thread and source line:
//   race-RAW race-WAR race-WW   shared memory: access not ordered after another thread's
//   global-race        global memory: as above within a block; between blocks of a launch any two
//                      accesses to the same bytes unless both are reads or both atomic
//   uninitialised      read of shared memory that was never written
//   in-flight          access to shared memory that an asynchronous copy still writes, or that
//                      wgmma or a bulk store still reads; end of a thread or block with one pending
//   out-of-bounds      shared memory: outside the block's bytes. Global memory: outside the Buffer
//                      (its guard pages and the rest of its last page included) or unmapped
//   misaligned         address not a multiple of what the instruction requires
//   divergence         lanes of a warp in different warp instructions, or in different places of
//                      one that needs the whole warp, or exited from it; masks without the caller;
//                      shuffles from lanes outside the mask; a warpgroup that disagrees
//   barrier            named barrier with a bad id or thread count, or used with two counts
//   deadlock           nothing can run: who waits where
//   mbarrier           use before init, more arrivals than the count
//   proxy-fence        wgmma or bulk store reads what threads wrote without fence.proxy.async
//   wgmma-fence wgmma  accumulators touched without wgmma.fence; waiting for uncommitted wgmma
//   tma setmaxnreg     bad descriptors, boxes, register counts
//   launch             configuration that a GPU refuses
//
// Model:
//   - Order comes from bar.sync / barrier.sync, named barriers, bar.warp.sync, mbarriers and waits
//     for asynchronous copies. Shuffles, votes, mma and ldmatrix give none.
//   - cp.async: the destination holds NaN from the issue until the issuing thread waits for the
//     group; only then is the source copied. Other threads need a barrier after that wait.
//   - TMA and bulk copies complete a random number of scheduler rounds after their issue
//     (Options::async_delay) and act as threads of their own.
//   - wgmma computes at once, but reads its shared operands until wgmma.wait_group.
//   - Shared memory holds NaN (0xFF) at the start of every block, a Buffer of global memory too.
//   - Matrix products: products of 16-bit numbers are exact in fp32 and are added one by one in
//     fp32, k ascending, starting from the accumulator. A GPU adds several at once with truncation.
//   - ex2, lg2, rcp, ... are the translator's: the correctly rounded functions of the C library,
//     subnormals flushed where the instruction says .ftz.
//   - Remembered are the last write of every 4-byte word; of reads in shared memory the last of
//     each warp, in global memory two per 16 bytes and one by an earlier block. Races between
//     several lanes of one warp, or of bytes within a word, may therefore show in one order of
//     threads only: tests run all three.
//   - Not here: clusters and distributed shared memory, multicast, textures, cross-block waiting
//     (blocks run in order) and ordering between blocks through atomics (such data is reported).
//
// Compile translated kernels with -g1 (source lines) and -fno-optimize-sibling-calls (the return
// address of a call into the emulator is the place in the kernel).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "emulator/runtime/number_formats.h"

// The rest of the emulator's library is hidden, which makes it faster.
#pragma GCC visibility push(default)

namespace emu {

struct Dim3 {
  uint32_t x = 1;
  uint32_t y = 1;
  uint32_t z = 1;
};

// ---- what tests call ----

enum class Order { forward, reverse, random };  // of warps, and of lanes in a warp

struct Options {
  Order order = Order::forward;
  uint64_t seed = 1;                 // of Order::random and of the delays
  bool check = true;                 // races, uninitialised and in-flight data
  int async_delay = 2;               // most scheduler rounds a bulk copy takes
  size_t max_reports = 20;           // distinct ones, per take_result()
  uint32_t smem_limit = 227 * 1024;  // shared memory a block can have
  // What cudaDeviceGetAttribute says. Every combination is a device of its own, because a program
  // may ask a device once.
  int num_sms = 4;
  int compute_capability = 80;
  int smem_per_sm = 228 * 1024;
  int l2_bytes = 50 << 20;
};
Options& options();  // of the launches from now on

struct Report {
  std::string kind;
  std::string text;    // what happened
  std::string kernel;  // demangled, without its parameters
  Dim3 block;
  int thread;         // linear index in the block, -1 for none
  std::string where;  // "forward.cuh:120 <- forward.cuh:310"; empty if unknown
  uint64_t count;     // times seen (same kind, same place)
};

struct Stats {
  uint64_t launches, blocks, switches;
  uint64_t mma, wgmma, shuffles, barriers, cp_async, bulk_copies;
  // Shared memory in wavefronts: how many a conflict-free access would take, how many it took.
  uint64_t ldmatrix_ideal, ldmatrix_wavefronts;  // and stmatrix
  uint64_t shared_ideal, shared_wavefronts;      // ld.shared and st.shared
};

struct Launch {
  std::string name;  // mangled
  Dim3 grid;
  Dim3 block;
  uint32_t shared_bytes;  // static and dynamic
};

struct Result {
  std::vector<Report> reports;
  std::vector<Launch> launches;
  Stats stats{};

  bool has(const char* kind) const;
  std::string text() const;  // all reports, one paragraph each; empty if there is none
};
Result take_result();  // since the last call

// Global memory that ends (up to 15 bytes) at a page nobody may touch, with one before it.
void* global_malloc(size_t bytes, int fill = 0xFF);
void global_free(void* pointer);

template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t size)
      : data_(static_cast<T*>(global_malloc(size * sizeof(T)))), size_(size) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) {
    other.data_ = nullptr;
  }
  ~Buffer() {
    if (data_) global_free(data_);
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }

 private:
  T* data_;
  size_t size_;
};

// Runs a kernel that is written in C++ with the functions below. False if it was stopped early.
bool launch(const char* name, Dim3 grid, Dim3 block, uint32_t shared_bytes,
            const std::function<void()>& kernel);

// Runs a registered kernel. `arguments`: one pointer per parameter, as for cudaLaunchKernel.
bool launch_registered(const char* mangled_name, Dim3 grid, Dim3 block,
                       uint32_t dynamic_shared_bytes, void* const* arguments);

// ---- what translated files call when they are loaded ----

struct Parameter {
  uint32_t offset;
  uint32_t bytes;
};

struct Kernel {
  const char* name;  // mangled
  void (*function)(const unsigned char* params);
  std::vector<Parameter> parameters;
  uint32_t static_shared_bytes = 0;  // rounded up to the alignment of the dynamic part behind it
  uint32_t max_threads = 1024;       // .maxntid
};
int register_kernel(Kernel kernel);  // replaces an earlier one of the same name; returns 0
const Kernel* find_kernel(const char* mangled_name);  // null if there is none

// Calls that a compiler must not copy into two branches: lanes have to meet at one place.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((convergent)), apply_to = function)
#endif

// ---- what kernels call: special registers ----

struct ThreadRegisters {
  Dim3 tid, ctaid, ntid, nctaid;
  uint32_t thread;  // linear index in the block; lane = thread % 32, warp = thread / 32
};
extern ThreadRegisters regs;  // of the running thread
inline uint32_t laneid() { return regs.thread % 32; }
inline uint32_t warpid() { return regs.thread / 32; }

// ---- memory ----

// Addresses of the shared window: static data first, then dynamic. Multiple of 1024, as on a GPU.
constexpr uint32_t kSharedBase = 0x400;

// Host address of the byte at kSharedBase, which is its generic address: also a multiple of 1024.
extern unsigned char* const shared_memory;
inline uint64_t shared_to_generic(uint64_t address) {
  return reinterpret_cast<uint64_t>(shared_memory) + address - kSharedBase;
}
constexpr uint32_t kSharedWindowBytes = 256 * 1024;
inline bool generic_is_shared(uint64_t address) {
  return address - reinterpret_cast<uint64_t>(shared_memory) < kSharedWindowBytes;
}
inline uint64_t generic_to_shared(uint64_t address) {
  return address - reinterpret_cast<uint64_t>(shared_memory) + kSharedBase;
}

// bytes: 1, 2, 4, 8 or 16, of the whole access where it is a vector's.
void ld_shared(uint32_t address, void* out, int bytes);
void st_shared(uint32_t address, const void* in, int bytes);
void ld_global(uint64_t address, void* out, int bytes);
void ld_global_nc(uint64_t address, void* out, int bytes);  // not written in this launch
void st_global(uint64_t address, const void* in, int bytes);
void ld_generic(uint64_t address, void* out, int bytes);  // shared, local or global
void st_generic(uint64_t address, const void* in, int bytes);

// atom and red: checks the access; the caller then reads and writes through the pointer, which
// nothing can interrupt.
void* atomic_shared(uint32_t address, int bytes);
void* atomic_global(uint64_t address, int bytes);
void* atomic_generic(uint64_t address, int bytes);

// ---- warp instructions ----

enum class Shuffle { up, down, bfly, idx };
enum class Vote { all, any, uni };
enum class Reduce { add, min, max, and_, or_, xor_ };

void syncwarp(uint32_t mask);  // bar.warp.sync
// shfl.sync: b = lane or distance, c = clamp and segment mask. `in_range` gets the predicate.
uint32_t shfl(Shuffle mode, uint32_t value, uint32_t b, uint32_t c, uint32_t mask,
              bool* in_range = nullptr);
uint32_t ballot(uint32_t mask, bool predicate);
bool vote(Vote mode, uint32_t mask, bool predicate);
uint32_t match_any(uint32_t mask, uint64_t value);
uint32_t match_all(uint32_t mask, uint64_t value);  // 0 unless all are equal
uint32_t redux_u32(Reduce op, uint32_t mask, uint32_t value);
int32_t redux_s32(Reduce op, uint32_t mask, int32_t value);
bool elect(uint32_t mask, uint32_t* leader = nullptr);
uint32_t activemask();  // lanes that have not exited

// Matrices. Fragments as in PTX ISA, "Warp-level matrix instructions".
enum class Type16 { f16, bf16 };
void mma_m16n8k16(float d[4], const uint32_t a[4], const uint32_t b[2], Type16 type);  // d += a b
void mma_m16n8k8(float d[4], const uint32_t a[2], const uint32_t b[1], Type16 type);
void ldmatrix(uint32_t* r, int count, bool transposed, uint32_t address);  // count: 1, 2, 4
void stmatrix(const uint32_t* r, int count, bool transposed, uint32_t address);
uint32_t movmatrix(uint32_t a);  // .trans

// ---- barriers ----

constexpr int kWholeBlock = -1;
void barrier_sync(int id, int threads = kWholeBlock);
void barrier_arrive(int id, int threads);
bool barrier_reduce_and(int id, int threads, bool predicate);  // barrier.red
bool barrier_reduce_or(int id, int threads, bool predicate);
uint32_t barrier_reduce_popc(int id, int threads, bool predicate);

void mbarrier_init(uint32_t address, uint32_t count);
void mbarrier_inval(uint32_t address);
void mbarrier_expect_tx(uint32_t address, uint32_t bytes);
void mbarrier_arrive(uint32_t address, uint32_t count = 1);
void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes);
// try_wait.parity: blocks until the phase of that parity is complete, so the answer is "true".
void mbarrier_wait(uint32_t address, uint32_t parity);
bool mbarrier_test_wait(uint32_t address, uint32_t parity);  // does not block

// ---- asynchronous copies ----

void cp_async(uint32_t shared, uint64_t global, int bytes, int source_bytes);  // the rest is zero
void cp_async_commit();
void cp_async_wait(int pending_groups);
void cp_async_wait_all();
void cp_async_mbarrier_arrive(uint32_t mbarrier, bool noinc);

// The emulator's CUtensorMap: what cuTensorMapEncodeTiled of cuda_runtime.cpp writes.
struct alignas(64) TensorMap {
  uint64_t base;
  uint32_t rank;
  uint32_t element_bytes;
  uint32_t swizzle;    // 0, 32, 64 or 128 bytes
  uint32_t size[5];    // innermost first, in elements
  uint64_t stride[5];  // in bytes; stride[0] is not used
  uint16_t box[5];
  uint16_t magic;  // kTensorMapMagic
};
constexpr uint16_t kTensorMapMagic = 0x7A3A;
static_assert(sizeof(TensorMap) == 128);

// cp.async.bulk.tensor, tiled. Coordinates innermost first.
void tma_load(const TensorMap* map, uint32_t shared, uint32_t mbarrier, const int32_t* coordinates);
void tma_store(const TensorMap* map, uint32_t shared, const int32_t* coordinates);
void tma_reduce_add(const TensorMap* map, uint32_t shared, const int32_t* coordinates);  // fp32
// cp.async.bulk, cp.reduce.async.bulk: sizes and addresses are multiples of 16.
void bulk_load(uint32_t shared, uint64_t global, uint32_t bytes, uint32_t mbarrier);
void bulk_store(uint64_t global, uint32_t shared, uint32_t bytes);
void bulk_reduce_add(uint64_t global, uint32_t shared, uint32_t bytes);  // fp32
void bulk_commit();
void bulk_wait(int pending_groups);       // written
void bulk_wait_read(int pending_groups);  // shared memory may be reused

// ---- warpgroups ----

void fence_proxy_async();  // also fence.mbarrier_init
// wgmma.mma_async m64 n k16: d (n / 2 values) = scale_d * d + a b, negated where imm-scale says -1.
// a: from registers, or null for the descriptor. Transposed: the operand is MN-major.
struct WgmmaOperands {
  const uint32_t* a;
  uint64_t a_descriptor;
  uint64_t b_descriptor;
  bool scale_d;
  bool negate_a, negate_b;
  bool a_transposed, b_transposed;
  Type16 type;
};
void wgmma(float* d, int n, const WgmmaOperands& operands);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending_groups);
void setmaxnreg(int count);

#if defined(__clang__)
#pragma clang attribute pop
#endif

}  // namespace emu

#pragma GCC visibility pop
