// Slightly different problems for the reference: what a kernel with one small mistake would
// compute. Each must be noticed, or the tolerances are worth nothing.
#pragma once

#include <algorithm>
#include <vector>

#include "tests/cpp/attention_reference.h"

namespace anyflash::fuzz {

// What changed params point to.
struct Changed {
  std::vector<int32_t> lengths;
  int64_t rng_state[2];
};

struct Perturbation {
  const char* name;
  void (*apply)(AttentionParams& p, Changed& changed);
};

constexpr Perturbation kPerturbations[] = {
    {"last key missing",
     [](AttentionParams& p, Changed& changed) {
       for (int64_t b = 0; b < p.batch; ++b) {
         const reference::Sequence s(p, b);
         const int64_t end = s.seqlen_k + (p.leftpad_k ? p.leftpad_k[b] : 0);
         changed.lengths.push_back(static_cast<int32_t>(s.seqlen_k > 0 ? end - 1 : end));
       }
       p.seqused_k = changed.lengths.data();
     }},
    {"first key missing",
     [](AttentionParams& p, Changed& changed) {
       for (int64_t b = 0; b < p.batch; ++b) {
         const reference::Sequence s(p, b);
         changed.lengths.push_back((p.leftpad_k ? p.leftpad_k[b] : 0) + (s.seqlen_k > 0 ? 1 : 0));
       }
       p.leftpad_k = changed.lengths.data();
     }},
    {"window one key wider",
     [](AttentionParams& p, Changed&) {
       p.window_left += p.window_left >= 0;
       p.window_right += p.window_right >= 0;
     }},
    {"window one key narrower",
     [](AttentionParams& p, Changed&) {
       p.window_left -= p.window_left > 0;
       p.window_right -= p.window_right > 0;
     }},
    {"other dropout bits",
     [](AttentionParams& p, Changed& changed) {
       if (!p.rng_state) return;
       changed.rng_state[0] = p.rng_state[0];
       changed.rng_state[1] = p.rng_state[1] + 1;
       p.rng_state = changed.rng_state;
     }},
};

// What stored key `row` of v is multiplied with beside its probability: 0 where query i cannot see
// it.
inline double factor(const reference::Sequence& s, int64_t head, int64_t i, int64_t row) {
  const int64_t j = row - s.first_k;
  if (j < 0 || j >= s.seqlen_k) return 0;
  const reference::Logit logit =
      reference::logit(s, {}, head, i, j, reference::Dot(nullptr, nullptr, 0));
  if (!(logit.value > -reference::kInfinity)) return 0;  // hidden, or the bias is not there
  return reference::dropout_factor(s, head, i, j);
}

// Whether some key counts for some query in one of them and not in the other.
inline bool differ(const AttentionParams& a, const AttentionParams& b) {
  for (int64_t index = 0; index < a.batch; ++index) {
    const reference::Sequence s(a, index), t(b, index);
    const int64_t begin = std::min(s.first_k, t.first_k);
    const int64_t end = std::max(s.first_k + s.seqlen_k, t.first_k + t.seqlen_k);
    for (int64_t head = 0; head < a.heads; ++head) {
      for (int64_t i = 0; i < s.seqlen_q; ++i) {
        for (int64_t row = begin; row < end; ++row) {
          if (factor(s, head, i, row) != factor(t, head, i, row)) return true;
        }
      }
    }
  }
  return false;
}

}  // namespace anyflash::fuzz
