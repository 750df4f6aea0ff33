#include "kernels/cpu/plan.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>

namespace anyflash::cpu {

int64_t busy_threads(int64_t work) {
  int64_t threads = 1;
  while (threads < kManyThreads && 2 * threads * kShare <= work) threads *= 2;
  return threads;
}

double busy_part(const std::vector<int64_t>& costs, int64_t threads) {
  const auto work = std::accumulate(costs.begin(), costs.end(), 0.0);
  if (work == 0 || threads == 1) return 1;
  // Nobody waits longer than the longest item takes.
  const auto longest = static_cast<double>(*std::max_element(costs.begin(), costs.end()));
  const double at_least = work / (work + static_cast<double>(threads - 1) * longest);
  if (at_least >= kBusyEnough) return at_least;
  std::priority_queue<int64_t, std::vector<int64_t>, std::greater<int64_t>> free;
  for (int64_t i = 0; i < threads; ++i) free.push(0);
  int64_t last = 0;
  for (const int64_t cost : costs) {
    const int64_t done = free.top() + cost;
    free.pop();
    free.push(done);
    last = std::max(last, done);
  }
  return work / static_cast<double>(threads * last);
}

}  // namespace anyflash::cpu
