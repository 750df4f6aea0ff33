// Pairs of columns, turned by the angle of their row's position; one token of one sequence at a
// time, so that all its heads share the angles.
#pragma once

#include "kernels/cpu/rows.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/work.h"
#include "kernels/launch.h"
#include "kernels/rotary_params.h"

namespace anyflash::cpu::ANYFLASH_ISA {

constexpr int kMaxPairs = 256;

// The angles of some pairs of one position, laid out like the columns they turn.
struct Angles {
  // Interleaved: cos c0, c0, c1, c1, ... and sin -s0, s0, -s1, s1, ...; else one per pair.
  alignas(64) float cos[2 * kMaxPairs + 2 * kLanes];
  alignas(64) float sin[2 * kMaxPairs + 2 * kLanes];
};

template <class T>
ANYFLASH_INLINE void load_angles(const T* cos, const T* sin, int pairs, bool interleaved,
                                 bool conjugate, Angles& angles) {
  for (int i = 0; i < pairs; i += kLanes) {
    const Float c = load_some(cos + i, pairs - i), s = load_some(sin + i, pairs - i);
    const Float turn = conjugate ? -s : s;
    if (interleaved) {
      store_words(angles.cos + 2 * i, interleave_low((Words)c, (Words)c));
      store_words(angles.cos + 2 * i + kLanes, interleave_high((Words)c, (Words)c));
      store_words(angles.sin + 2 * i, interleave_low((Words)-turn, (Words)turn));
      store_words(angles.sin + 2 * i + kLanes, interleave_high((Words)-turn, (Words)turn));
    } else {
      store(angles.cos + i, c);
      store(angles.sin + i, turn);
    }
  }
}

// (x[1], x[0], x[3], x[2], ...)
ANYFLASH_INLINE Float neighbours_swapped(Float x) {
  using Pairs = uint64_t __attribute__((vector_size(kVectorBytes)));
  const Pairs pairs = (Pairs)x;
  return (Float)(pairs << 32 | pairs >> 32);
}

// y = x turned; y may be x. Not interleaved, the second members lie `apart` behind the first.
template <class T>
ANYFLASH_INLINE void turn(const Angles& angles, int pairs, bool interleaved, int64_t apart,
                          const T* x, T* y) {
  if (interleaved) {
    for (int i = 0; i < 2 * pairs; i += kLanes) {
      const Float a = load_some(x + i, 2 * pairs - i);
      const Float turned = a * load(angles.cos + i) + neighbours_swapped(a) * load(angles.sin + i);
      store_some(y + i, turned, 2 * pairs - i);
    }
  } else {
    for (int i = 0; i < pairs; i += kLanes) {
      const Float a = load_some(x + i, pairs - i), b = load_some(x + apart + i, pairs - i);
      const Float cos = load(angles.cos + i), sin = load(angles.sin + i);
      store_some(y + i, a * cos - b * sin, pairs - i);
      store_some(y + apart + i, b * cos + a * sin, pairs - i);
    }
  }
}

// ---- The operator.

// Where a token stands: its sequence, p.batch if it is of none, and its position.
struct Place {
  int64_t sequence;
  int64_t row;

  ANYFLASH_HOST_DEVICE Place(const RotaryParams& p, int64_t token) {
    if (p.cu_seqlens == nullptr) {
      sequence = token / p.seqlen;
      row = token % p.seqlen;
      return;
    }
    // The first sequence that ends behind the token.
    int64_t begin = 0, end = p.batch;
    while (begin < end) {
      const int64_t middle = (begin + end) / 2;
      if (p.cu_seqlens[middle + 1] <= token) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    sequence = begin;
    row = token - p.cu_seqlens[sequence];
  }

  // -1 where there is none in the tables.
  ANYFLASH_HOST_DEVICE int64_t position(const RotaryParams& p) const {
    if (sequence >= p.batch) return -1;
    const int64_t offset = p.seqlen_offsets ? p.seqlen_offsets[sequence] : 0;
    const int64_t left = p.seqlen_rotary - p.seqlen_offset - row;
    return offset < left ? p.seqlen_offset + row + offset : -1;
  }
};

template <class T>
ANYFLASH_INLINE T* heads_of(const RotaryParams& p, const Rows& x, int64_t token,
                            const Place& place) {
  const int64_t offset = p.cu_seqlens ? token * x.row_stride
                                      : place.sequence * x.batch_stride + place.row * x.row_stride;
  return static_cast<T*>(x.data) + offset;
}

template <class Table>
ANYFLASH_INLINE void load_angles(const RotaryParams& p, int64_t position, int64_t first, int pairs,
                                 Angles& angles) {
  load_angles(static_cast<const Table*>(p.cos) + position * p.cos_stride + first,
              static_cast<const Table*>(p.sin) + position * p.sin_stride + first, pairs,
              p.interleaved, p.conjugate, angles);
}

template <class T>
ANYFLASH_INLINE void rotate_token(const RotaryParams& p, int64_t token) {
  const Place place(p, token);
  const int64_t position = place.position(p);
  const T* x = heads_of<const T>(p, p.x, token, place);
  T* y = heads_of<T>(p, p.y, token, place);
  const int64_t pairs = position >= 0 ? p.pairs : 0;
  Angles angles;
  for (int64_t first = 0; first < pairs; first += kMaxPairs) {
    const int count = static_cast<int>(smaller<int64_t>(kMaxPairs, pairs - first));
    if (p.tables_are_fp32) {
      load_angles<float>(p, position, first, count, angles);
    } else {
      load_angles<T>(p, position, first, count, angles);
    }
    const int64_t column = p.interleaved ? 2 * first : first;
    for (int64_t head = 0; head < p.heads; ++head) {
      // The next token: often another page of memory, where the processor does not look by itself.
      prefetch_row(x + p.x.row_stride + head * p.x.head_stride + column, 2 * count);
      turn(angles, count, p.interleaved, pairs, x + head * p.x.head_stride + column,
           y + head * p.y.head_stride + column);
    }
  }
  const int64_t rest = p.head_dim - 2 * pairs;
  if (x == y || rest == 0) return;
  for (int64_t head = 0; head < p.heads; ++head) {
    memcpy(y + head * p.y.head_stride + 2 * pairs, x + head * p.x.head_stride + 2 * pairs,
           static_cast<size_t>(rest) * sizeof(T));
  }
}

// A task of run_parallel: some tokens.
constexpr int64_t kRotaryElements = 1 << 14;

ANYFLASH_INLINE int64_t rotary_tokens(const RotaryParams& p) {
  return p.cu_seqlens ? p.seqlen : p.batch * p.seqlen;
}

ANYFLASH_INLINE int64_t rotary_tokens_per_task(const RotaryParams& p) {
  return larger<int64_t>(1, kRotaryElements / larger<int64_t>(1, p.heads * p.head_dim));
}

template <class T>
static void rotate_tokens(void* params, int64_t task, char*) {
  const auto& p = *static_cast<const RotaryParams*>(params);
  const int64_t begin = task * rotary_tokens_per_task(p);
  const int64_t end = smaller(rotary_tokens(p), begin + rotary_tokens_per_task(p));
  for (int64_t token = begin; token < end; ++token) rotate_token<T>(p, token);
}

template <class T>
ANYFLASH_INLINE int32_t rotary_forward(const void* params, void* threads) {
  const auto& p = *static_cast<const RotaryParams*>(params);
  if (p.pairs < 0 || 2 * p.pairs > p.head_dim) return kErrorInvalidParams;
  const int64_t each = rotary_tokens_per_task(p), tasks = (rotary_tokens(p) + each - 1) / each;
  return run_parallel(static_cast<const CpuThreads*>(threads), tasks, tasks, 0, rotate_tokens<T>,
                      const_cast<void*>(params));
}

}  // namespace anyflash::cpu::ANYFLASH_ISA
