// What a core can multiply and add at most: chains of multiply-adds that stay in registers, enough
// of them to hide the latency of one. Compiled by peers.py with the flags of the running machine.
#include <thread>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kChains = 20;
#elif defined(__AVX__)
constexpr int kBytes = 32, kChains = 12;
#else
constexpr int kBytes = 16, kChains = 20;
#endif

using Vector [[gnu::vector_size(kBytes)]] = float;

struct Fp32 {
  static constexpr int kOperations = 2 * kBytes / 4;
  Vector factor = Vector{} + 0.5f;
  Vector operator()(Vector sum) const { return sum * factor + factor; }
};

#ifdef __AVX512BF16__
struct Bf16 {
  static constexpr int kOperations = 2 * kBytes / 2;
  __m512bh factor{};
  Vector operator()(Vector sum) const {
    return reinterpret_cast<Vector>(_mm512_dpbf16_ps(__m512(sum), factor, factor));
  }
};
#endif

template <class Step>
void steps(long count) {
  const Step step{};
  Vector sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = Vector{} + float(i);  // or one chain serves for all
  for (long i = 0; i < count; ++i) {
#pragma GCC unroll 20
    for (Vector& sum : sums) sum = step(sum);
  }
  for (Vector& sum : sums) asm volatile("" : : "m"(sum));
}

// On that many threads at once; returns the operations of all of them.
template <class Step>
double run(int threads, long count) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(steps<Step>, count);
  steps<Step>(count);
  for (std::thread& other : others) other.join();
  return double(threads) * count * kChains * Step::kOperations;
}

}  // namespace

extern "C" double peak_fp32(int threads, long count) { return run<Fp32>(threads, count); }

// Zero where there is no such instruction.
extern "C" double peak_bf16(int threads, long count) {
#ifdef __AVX512BF16__
  return run<Bf16>(threads, count);
#else
  return 0;
#endif
}
