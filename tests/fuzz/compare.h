// Results beside what they should be.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

#include "tests/cpp/attention_reference.h"
#include "tests/fuzz/guarded.h"
#include "tests/fuzz/numbers.h"

namespace anyflash::fuzz {

// The first difference in words, or nothing. What is not to be written must still be poison, bit
// for bit. `worst` is raised to the largest error in units of its bound.
inline std::string compare(const char* what, Dtype dtype, const Guarded& found,
                           const reference::Values& expected, double* worst) {
  const int64_t bytes = bytes_of(dtype);
  std::string first;
  int64_t wrong = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(expected.value.size()); ++i) {
    char text[200];
    if (!expected.written(i)) {
      const unsigned char* at = found.as<unsigned char>() + i * bytes;
      if (std::all_of(at, at + bytes, [](unsigned char x) { return x == 0xFF; })) continue;
      std::snprintf(text, sizeof(text), "%s[%ld] was written; ", what, long(i));
    } else {
      const double x = reference::read(dtype, found.as(), i);
      const double error = x == expected.value[i] ? 0 : std::fabs(x - expected.value[i]);
      if (error <= expected.bound[i]) {
        if (error > 0) *worst = std::max(*worst, error / expected.bound[i]);
        continue;
      }
      std::snprintf(text, sizeof(text), "%s[%ld] = %.9g, expected %.9g +- %.2g; ", what, long(i), x,
                    expected.value[i], expected.bound[i]);
    }
    if (wrong++ == 0) first = text;
  }
  if (wrong > 1) {
    first += "(" + std::to_string(wrong) + " of " + std::to_string(expected.value.size()) + ") ";
  }
  return first;
}

}  // namespace anyflash::fuzz
