// Where the keys of a sequence lie and how many there are: the one rule (csrc/schemas.def).
#pragma once

#include "kernels/masks.h"

namespace anyflash {

// Stored rows first <= row < first + length, in the sequence's batch entry or pages; packed: of
// all.
template <typename Index>
struct KeySpan {
  Index first;
  Index length;
};

struct KeyLengths {
  const int32_t* cu_seqlens_k;  // (batch + 1), may be null
  const int32_t* seqused_k;     // (batch), may be null
  const int32_t* leftpad_k;     // (batch), may be null
  bool paged;
  int64_t seqlen_k;  // of a sequence about which these say nothing

  // The keys a sequence has, those that leftpad_k skips included: what seqused_k says and nothing
  // else where it is given; then cu_seqlens_k only says where keys begin. Paged keys begin at 0.
  template <typename Index>
  ANYFLASH_HOST_DEVICE KeySpan<Index> stored(Index sequence) const {
    KeySpan<Index> span{0, Index(seqlen_k)};
    if (cu_seqlens_k && !paged) span.first = cu_seqlens_k[sequence];
    if (seqused_k) {
      span.length = seqused_k[sequence];
    } else if (cu_seqlens_k) {
      span.length = cu_seqlens_k[sequence + 1] - cu_seqlens_k[sequence];
    }
    return span;
  }

  // The keys that queries may see: behind the left padding.
  template <typename Index>
  ANYFLASH_HOST_DEVICE KeySpan<Index> visible(Index sequence) const {
    KeySpan<Index> span = stored(sequence);
    const Index skipped = leftpad_k ? leftpad_k[sequence] : 0;
    return {span.first + skipped, larger<Index>(span.length - skipped, 0)};
  }
};

}  // namespace anyflash
