// Slightly different problems for the reference: what a kernel with one small mistake would
// compute. Each must be noticed, or the tolerances are worth nothing.
#pragma once

#include <string>
#include <vector>

#include "tests/cpp/attention_reference.h"

namespace anyflash::fuzz {

struct Perturbation {
  const char* name;
  void (*apply)(AttentionParams& p, std::vector<int32_t>& lengths);
};

constexpr Perturbation kPerturbations[] = {
    {"last key missing",
     [](AttentionParams& p, std::vector<int32_t>& lengths) {
       for (int64_t b = 0; b < p.batch; ++b) {
         const reference::Sequence s(p, b);
         const int64_t end = s.seqlen_k + (p.leftpad_k ? p.leftpad_k[b] : 0);
         lengths.push_back(static_cast<int32_t>(s.seqlen_k > 0 ? end - 1 : end));
       }
       p.seqused_k = lengths.data();
     }},
    {"first key missing",
     [](AttentionParams& p, std::vector<int32_t>& lengths) {
       for (int64_t b = 0; b < p.batch; ++b) {
         const reference::Sequence s(p, b);
         lengths.push_back((p.leftpad_k ? p.leftpad_k[b] : 0) + (s.seqlen_k > 0 ? 1 : 0));
       }
       p.leftpad_k = lengths.data();
     }},
    {"window one key wider",
     [](AttentionParams& p, std::vector<int32_t>&) {
       p.window_left += p.window_left >= 0;
       p.window_right += p.window_right >= 0;
     }},
    {"window one key narrower",
     [](AttentionParams& p, std::vector<int32_t>&) {
       p.window_left -= p.window_left > 0;
       p.window_right -= p.window_right > 0;
     }},
    {"other dropout bits", [](AttentionParams& p, std::vector<int32_t>&) { ++p.offset; }},
};

// Whether some key counts for some query in one of them and not in the other.
inline bool differ(const AttentionParams& a, const AttentionParams& b) {
  for (int64_t i = 0; i < a.batch; ++i) {
    const reference::Sequence s(a, i), t(b, i);
    if (s.seqlen_q > 0 && s.seqlen_k != t.seqlen_k) return true;
    for (int64_t row = 0; row < s.seqlen_q; ++row) {
      for (int64_t key = 0; key < s.seqlen_k; ++key) {
        if (s.visible(row, key) != t.visible(row, key)) return true;
        if (s.visible(row, key) && reference::dropout_factor(s, 0, row, key) !=
                                       reference::dropout_factor(t, 0, row, key)) {
          return true;
        }
      }
    }
  }
  return false;
}

}  // namespace anyflash::fuzz
