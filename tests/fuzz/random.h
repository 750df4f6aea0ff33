// Random numbers from a seed, the same on every machine.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>

namespace anyflash::fuzz {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed * 0x9E3779B97F4A7C15u + 1) {}

  uint64_t bits() { return engine_(); }
  int64_t signed_bits() { return static_cast<int64_t>(bits()); }
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  bool chance(double probability) { return uniform() < probability; }
  int64_t integer(int64_t least, int64_t most) {
    return least + static_cast<int64_t>(engine_() % static_cast<uint64_t>(most - least + 1));
  }
  // Each power of two as likely as the next.
  int64_t log_integer(int64_t least, int64_t most) {
    const double x =
        std::exp(uniform() * std::log((most + 1.0) / least)) * static_cast<double>(least);
    return std::min(most, static_cast<int64_t>(x));
  }
  double normal() {  // near enough: variance 1, at most 3.5
    double sum = 0;
    for (int i = 0; i < 4; ++i) sum += uniform() - 0.5;
    return sum * std::sqrt(3.0);
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace anyflash::fuzz
