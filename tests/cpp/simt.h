// Runs a kernel's source on the CPU: a fiber per thread, __syncthreads a switch to the next fiber.
// For kernels that use no more of CUDA than thread indices, barriers, shared arrays and the
// functions below; blocks run one after the other.
//
// kernels/common/ptx.cuh includes this file when no CUDA compiler is at work. A missing barrier
// shows as a wrong result in one of the two thread orders; a barrier that only part of a block
// reaches, as an exception.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#include "kernels/common/launch_kernel.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static

namespace simt {

struct Index {
  uint32_t x = 0, y = 0;
};

inline Index thread_idx, block_idx, grid_dim;
inline bool reverse_order = false;

struct Fiber {
  static constexpr size_t kStackBytes = 64 * 1024;
  ucontext_t context;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
  bool finished = false;
};

inline ucontext_t scheduler;
inline Fiber* running = nullptr;
inline const std::function<void()>* body = nullptr;

inline void enter_fiber() {
  (*body)();
  running->finished = true;
}

inline void barrier() { swapcontext(&running->context, &scheduler); }

inline void run_block(std::vector<Fiber>& fibers) {
  for (Fiber& fiber : fibers) {
    fiber.finished = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter_fiber, 0);
  }
  for (bool waiting = true; waiting;) {  // one round: every thread runs up to its next barrier
    size_t finished = 0;
    for (size_t i = 0; i < fibers.size(); ++i) {
      thread_idx.x = uint32_t(reverse_order ? fibers.size() - 1 - i : i);
      running = &fibers[thread_idx.x];
      swapcontext(&scheduler, &running->context);
      finished += running->finished;
    }
    if (finished != 0 && finished != fibers.size())
      throw std::runtime_error("only part of the block reached a barrier");
    waiting = finished == 0;
  }
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace simt

#define threadIdx simt::thread_idx
#define blockIdx simt::block_idx
#define gridDim simt::grid_dim
#define __syncthreads simt::barrier

namespace anyflash {

template <typename Params>
int32_t launch_kernel(void (*kernel)(Params), Grid grid, Params params, void*) {
  const std::function<void()> call = [&] { kernel(params); };
  simt::body = &call;
  simt::grid_dim = {grid.x, grid.y};
  static std::vector<simt::Fiber> fibers;
  if (fibers.size() != grid.threads) fibers = std::vector<simt::Fiber>(grid.threads);
  for (simt::block_idx.y = 0; simt::block_idx.y < grid.y; ++simt::block_idx.y) {
    for (simt::block_idx.x = 0; simt::block_idx.x < grid.x; ++simt::block_idx.x)
      simt::run_block(fibers);
  }
  return 0;
}

namespace ptx {

inline float ex2(float x) { return std::exp2(x); }
inline float rcp(float x) { return 1.f / x; }

inline void check_aligned(const void* global) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0)
    std::abort();  // exceptions cannot leave a fiber
}

inline float fp16_to_fp32(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000u) << 16;
  const uint32_t exponent = x >> 10 & 31u;
  const uint32_t mantissa = x & 0x3FFu;
  if (exponent == 0) return simt::as_float(sign | simt::as_bits(float(mantissa) * 0x1p-24f));
  const uint32_t biased = exponent == 31 ? 255 : exponent + 112;
  return simt::as_float(sign | biased << 23 | mantissa << 13);
}

inline uint16_t fp32_to_fp16(float x) {
  const uint32_t sign = simt::as_bits(x) >> 16 & 0x8000u;
  const uint32_t magnitude = simt::as_bits(x) & 0x7FFFFFFFu;
  if (x != x) return 0x7FFF;
  if (magnitude >= 0x47800000u) return uint16_t(sign | 0x7C00u);  // 2^16 and above
  if (magnitude < 0x38800000u) {  // subnormal: adding 1/2 rounds to multiples of 2^-24
    return uint16_t(sign | (simt::as_bits(simt::as_float(magnitude) + 0.5f) - 0x3F000000u));
  }
  return uint16_t(sign | (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13);
}

inline Words16 load_16(const void* global) {
  Words16 x;
  check_aligned(global);
  std::memcpy(&x, global, sizeof x);
  return x;
}

inline void store_16(void* global, const Words16& x) {
  check_aligned(global);
  std::memcpy(global, &x, sizeof x);
}

inline float bf16_to_fp32(uint16_t x) { return simt::as_float(uint32_t(x) << 16); }

inline uint16_t fp32_to_bf16(float x) {
  const uint32_t bits = simt::as_bits(x);
  return x != x ? uint16_t(0x7FFF) : uint16_t((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace ptx
}  // namespace anyflash
