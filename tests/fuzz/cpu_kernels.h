// The CPU kernels that run here, and a problem on them.
#pragma once

#include <string>
#include <vector>

#include "kernels/arch.h"
#include "tests/fuzz/problem.h"
#include "tests/fuzz/random_shape.h"

namespace anyflash::fuzz {

// The instances that compute one dtype on one instruction set.
struct Kernels {
  const Instance* forward;
  const Instance* backward;  // may be null

  reference::Arithmetic arithmetic() const {
    const std::string arch = forward->arch;
    const bool pairs = arch == "avx512bf16" || arch == "amx";  // bf16 into products
    return {forward->dtype, pairs ? 1.0 / 256 : 0, pairs ? 3e-6 : 2e-7};
  }

  Scope scope(Kind kind) const {
    return {forward->dtype, forward->features, backward != nullptr, kind};
  }

  // Runs into fresh memory; the backward uses the forward's own out and lse.
  int32_t run(const Problem& problem, const CpuThreads* threads, Results& results) const {
    void* where = const_cast<CpuThreads*>(threads);
    results = problem.forward_results();
    AttentionParams p = problem.with(results);
    const int32_t error = anyflash_launch(forward, &p, where);
    results.out.make_read_only();
    results.lse.make_read_only();
    if (error != 0 || !problem.shape().backward) return error;
    problem.add_backward_results(results);
    p = problem.with(results);
    return anyflash_launch(backward, &p, where);
  }
};

// Those that this CPU runs, or with a name those of that instruction set.
inline std::vector<Kernels> kernels_here(const std::string& arch = "") {
  int32_t count = 0;
  const Instance* all = anyflash_instances(&count);
  std::vector<Kernels> found;
  for (const Instance* forward = all; forward < all + count; ++forward) {
    if (forward->family != Family::attention || forward->device != Device::cpu ||
        forward->direction != Direction::forward ||
        !contains(anyflash_cpu_isa(), forward->min_sm) ||
        (!arch.empty() && arch != forward->arch)) {
      continue;
    }
    Kernels kernels{forward, nullptr};
    for (const Instance* other = all; other < all + count; ++other) {
      if (other->family == Family::attention && other->direction == Direction::backward &&
          other->dtype == forward->dtype && std::string(other->arch) == forward->arch) {
        kernels.backward = other;
      }
    }
    found.push_back(kernels);
  }
  return found;
}

inline Problem random_problem(uint64_t seed, const Scope& scope) {
  Random random(seed);
  const Shape shape = random_shape(random, scope);
  return {shape, scope.dtype, random.bits()};
}

}  // namespace anyflash::fuzz
