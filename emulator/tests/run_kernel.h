// Runs a small kernel (uint32_t* out, const uint32_t* in) on one block and returns what it wrote.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulator/runtime/emulator.h"
#include "tests/cpp/catch.h"

using Words = std::vector<uint32_t>;

constexpr uint32_t kWords = 8;  // of each thread, as in warp_kernels.cu
constexpr uint32_t kLanes = 32;

inline emu::Result run_reported(const char* name, const Words& in, Words& out,
                                uint32_t threads = kLanes, uint32_t blocks = 1,
                                uint32_t shared_bytes = 4096) {
  emu::Buffer<uint32_t> from(in.size());
  emu::Buffer<uint32_t> to(out.size());
  std::copy(in.begin(), in.end(), from.begin());
  std::copy(out.begin(), out.end(), to.begin());
  uint32_t* to_pointer = to.data();
  const uint32_t* from_pointer = from.data();
  void* arguments[] = {&to_pointer, &from_pointer};
  emu::launch_registered(name, {blocks}, {threads}, shared_bytes, arguments);
  std::copy(to.begin(), to.end(), out.begin());
  return emu::take_result();
}

// kWords words in and out per thread; nothing may be reported.
inline Words run(const char* name, const Words& in, uint32_t threads = kLanes) {
  Words out(threads * kWords, 0xABABABAB);
  CHECK(run_reported(name, in, out, threads).text() == "");
  return out;
}

// Small numbers that 16-bit formats hold exactly.
inline float small_number(uint32_t seed) { return float(seed * 2654435761u >> 16 & 7) - 3; }
