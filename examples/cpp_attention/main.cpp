// Causal attention over packed sequences on the CPU, without torch: packed_attention [threads]
#include <anyflash/kernels.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kHeads = 8, kHeadsK = 2, kHeadDim = 64;
constexpr float kScale = 0.125f;

// One thread per index; a server would hand the parts to its own pool.
int32_t parallel_for(int64_t begin, int64_t end, int64_t, anyflash::RangeBody body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = begin + 1; i < end; ++i) threads.emplace_back(body, i, i + 1, context);
  body(begin, begin + 1, context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}

struct Batch {
  std::vector<int32_t> begin{0};  // of each sequence, and the end of the last
  std::vector<float> q, k, v, out, lse;

  explicit Batch(const std::vector<int>& lengths) {
    for (const int length : lengths) begin.push_back(begin.back() + length);
    std::mt19937 engine(0);
    std::normal_distribution<float> normal;
    for (auto [x, heads] : {std::pair{&q, kHeads}, {&k, kHeadsK}, {&v, kHeadsK}}) {
      x->resize(begin.back() * heads * kHeadDim);
      for (float& value : *x) value = normal(engine);
    }
    out.resize(q.size());
    lse.resize(begin.back() * kHeads);
  }

  anyflash::AttentionParams params() {
    anyflash::AttentionParams p{};
    const auto rows = [](std::vector<float>& x, int64_t heads) {
      return anyflash::Rows{x.data(), 0, heads * kHeadDim, kHeadDim};
    };
    p.q = rows(q, kHeads);
    p.k = rows(k, kHeadsK);
    p.v = rows(v, kHeadsK);
    p.out = rows(out, kHeads);
    p.lse = {lse.data(), 0, begin.back()};
    p.cu_seqlens_q = p.cu_seqlens_k = begin.data();
    p.batch = static_cast<int64_t>(begin.size()) - 1;
    p.heads = kHeads;
    p.heads_k = kHeadsK;
    p.head_dim = p.head_dim_v = kHeadDim;
    p.softmax_scale = kScale;
    p.window_left = -1;
    p.window_right = 0;  // causal
    return p;
  }

  // The output of one row by definition.
  std::vector<double> plain_row(int64_t sequence, int64_t row, int64_t head) const {
    const int64_t first = begin[sequence], head_k = head / (kHeads / kHeadsK);
    const float* query = &q[((first + row) * kHeads + head) * kHeadDim];
    std::vector<double> result(kHeadDim);
    double sum = 0;
    for (int64_t key = 0; key <= row; ++key) {
      const int64_t at = ((first + key) * kHeadsK + head_k) * kHeadDim;
      double score = 0;
      for (int64_t c = 0; c < kHeadDim; ++c) score += double{query[c]} * k[at + c];
      const double weight = std::exp(kScale * score);
      sum += weight;
      for (int64_t c = 0; c < kHeadDim; ++c) result[c] += weight * v[at + c];
    }
    for (double& x : result) x /= sum;
    return result;
  }

  double largest_difference() const {
    double largest = 0;
    for (size_t sequence = 0; sequence + 1 < begin.size(); ++sequence) {
      const int64_t length = begin[sequence + 1] - begin[sequence];
      for (int64_t row = 0; row < length; row += 1 + length / 50) {
        for (int64_t head = 0; head < kHeads; ++head) {
          const std::vector<double> expected = plain_row(sequence, row, head);
          const float* found = &out[((begin[sequence] + row) * kHeads + head) * kHeadDim];
          for (int64_t c = 0; c < kHeadDim; ++c) {
            largest = std::max(largest, std::fabs(found[c] - expected[c]));
          }
        }
      }
    }
    return largest;
  }

  double operations() const {
    double pairs = 0;
    for (size_t i = 0; i + 1 < begin.size(); ++i) {
      const double length = begin[i + 1] - begin[i];
      pairs += length * (length + 1) / 2;
    }
    return 4 * kHeadDim * kHeads * pairs;
  }
};

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1])
                               : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  const anyflash::Instance* kernel =
      anyflash_find_kernel(anyflash::Family::attention, anyflash::Direction::forward,
                           anyflash::Dtype::fp32, anyflash::Device::cpu, kHeadDim);
  if (kernel == nullptr) {
    std::fprintf(stderr, "%s\n", anyflash_text());
    return 1;
  }
  Batch batch({1000, 37, 512, 1, 256, 0, 730});
  const anyflash::AttentionParams params = batch.params();
  anyflash::CpuThreads where{parallel_for, threads};

  double seconds = 1e9;
  for (int run = 0; run < 5; ++run) {
    const auto start = std::chrono::steady_clock::now();
    const int32_t error = anyflash_launch(kernel, &params, &where);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    seconds = std::min(seconds, took.count());
    if (error != 0) {
      std::fprintf(stderr, "%s: %s\n", kernel->name, anyflash_error_string(error));
      return 1;
    }
  }
  const double difference = batch.largest_difference();
  std::printf("%s, %d threads: %.2f ms, %.0f GFLOP/s\n", kernel->name, threads, seconds * 1e3,
              batch.operations() / seconds * 1e-9);
  std::printf("largest difference from a plain loop: %.3g\n", difference);
  return difference < 1e-5 ? 0 : 1;
}
