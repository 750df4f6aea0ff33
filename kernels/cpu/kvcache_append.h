// New keys and values go into the cache, keys and queries turned by the angles of their positions;
// one token of one sequence at a time.
#pragma once

#include "kernels/cpu/rotary.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/work.h"
#include "kernels/launch.h"

namespace anyflash::cpu::ANYFLASH_ISA {

template <class T>
ANYFLASH_INLINE void load_angles(const KvcacheAppendParams& p, int64_t position, Angles& angles) {
  // Queries may stand beyond the table; what they see there is the last angle.
  const int64_t row = smaller(larger<int64_t>(position, 0), p.seqlen_rotary - 1);
  load_angles(static_cast<const T*>(p.rotary_cos) + row * p.rotary_cos_stride,
              static_cast<const T*>(p.rotary_sin) + row * p.rotary_sin_stride,
              static_cast<int>(p.rotary_dim / 2), p.interleaved, false, angles);
}

template <class T>
ANYFLASH_INLINE void rotate_row(const KvcacheAppendParams& p, const Angles& angles, const T* x,
                                T* y) {
  const int64_t rotary_dim = p.rotary_dim, pairs = rotary_dim / 2;
  turn(angles, static_cast<int>(pairs), p.interleaved, pairs, x, y);
  memcpy(y + rotary_dim, x + rotary_dim, static_cast<size_t>(p.head_dim - rotary_dim) * sizeof(T));
}

template <class T>
ANYFLASH_INLINE T* token(const Rows& x, int64_t sequence, int64_t row) {
  return static_cast<T*>(x.data) + sequence * x.batch_stride + row * x.row_stride;
}

// A token of k and v, at position cache_seqlens[sequence] + row. One without a place in the cache
// is left out.
template <class T>
ANYFLASH_INLINE void append_token(const KvcacheAppendParams& p, int64_t sequence, int64_t row) {
  const int64_t position = p.cache_seqlens[sequence] + row;
  if (position < 0 || position >= p.pages_per_sequence * p.page_size) return;
  const int64_t index = sequence * p.block_table_stride + position / p.page_size;
  const int64_t page = p.block_table ? p.block_table[index] : sequence;
  if (page < 0 || page >= p.num_pages) return;
  const int64_t page_row = position % p.page_size;

  Angles angles;
  if (p.rotary_cos != nullptr) load_angles<T>(p, position, angles);
  const T* k = token<const T>(p.k, sequence, row);
  const T* v = token<const T>(p.v, sequence, row);
  T* k_cache = token<T>(p.k_cache, page, page_row);
  T* v_cache = token<T>(p.v_cache, page, page_row);
  for (int64_t head = 0; head < p.heads_k; ++head) {
    const T* from = k + head * p.k.head_stride;
    T* to = k_cache + head * p.k_cache.head_stride;
    if (p.rotary_cos != nullptr) {
      rotate_row(p, angles, from, to);
    } else {
      memcpy(to, from, static_cast<size_t>(p.head_dim) * sizeof(T));
    }
    memcpy(v_cache + head * p.v_cache.head_stride, v + head * p.v.head_stride,
           static_cast<size_t>(p.head_dim_v) * sizeof(T));
  }
}

template <class T>
ANYFLASH_INLINE void rotate_query(const KvcacheAppendParams& p, int64_t sequence, int64_t row) {
  Angles angles;
  load_angles<T>(p, p.cache_seqlens[sequence] + (p.q_positions_move ? row : 0), angles);
  const T* q = token<const T>(p.q, sequence, row);
  T* q_rotated = token<T>(p.q_rotated, sequence, row);
  for (int64_t head = 0; head < p.heads; ++head) {
    rotate_row(p, angles, q + head * p.q.head_stride, q_rotated + head * p.q_rotated.head_stride);
  }
}

// A task of run_parallel: some tokens, a sequence's new ones before its queries.
constexpr int64_t kTokenElements = 1 << 14;

ANYFLASH_INLINE int64_t tokens_per_sequence(const KvcacheAppendParams& p) {
  return p.seqlen_new + (p.rotary_cos ? p.seqlen_q : 0);
}

ANYFLASH_INLINE int64_t tokens_per_task(const KvcacheAppendParams& p) {
  const int64_t elements = larger(p.heads, p.heads_k) * p.head_dim;
  return larger<int64_t>(1, kTokenElements / larger<int64_t>(1, elements));
}

template <class T>
static void append_tokens(void* params, int64_t task, char*) {
  const auto& p = *static_cast<const KvcacheAppendParams*>(params);
  const int64_t per_sequence = tokens_per_sequence(p), begin = task * tokens_per_task(p);
  const int64_t end = smaller(p.batch * per_sequence, begin + tokens_per_task(p));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t sequence = i / per_sequence, row = i % per_sequence;
    if (row == 0 && p.seqused_k) {
      p.seqused_k[sequence] = static_cast<int32_t>(p.cache_seqlens[sequence] + p.seqlen_new);
    }
    if (row < p.seqlen_new) {
      append_token<T>(p, sequence, row);
    } else {
      rotate_query<T>(p, sequence, row - p.seqlen_new);
    }
  }
}

template <class T>
ANYFLASH_INLINE int32_t kvcache_append(const void* params, void* stream) {
  const auto& p = *static_cast<const KvcacheAppendParams*>(params);
  if (p.rotary_cos != nullptr && (p.rotary_dim > 2 * kMaxPairs || p.seqlen_rotary < 1)) {
    return kErrorInvalidParams;
  }
  const int64_t tokens = p.batch * tokens_per_sequence(p), each = tokens_per_task(p);
  const int64_t tasks = (tokens + each - 1) / each;
  return run_parallel(static_cast<const CpuThreads*>(stream), tasks, tasks, 0, append_tokens<T>,
                      const_cast<void*>(params));
}

}  // namespace anyflash::cpu::ANYFLASH_ISA
