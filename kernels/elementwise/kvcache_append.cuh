// New keys and values go to their places in the cache, keys and queries turned by the angles of
// their positions. Bound by memory, in decoding by latency: one kernel, 16-byte accesses.
//
// A block takes one token after the other, a sequence's new ones before its queries. Its threads
// stand in rows as wide as a head: a thread keeps its columns, and so its angles, from head to
// head.
#pragma once

#include "kernels/common/launch_kernel.h"
#include "kernels/common/ptx.cuh"
#include "kernels/launch.h"
#include "kernels/masks.h"
#include "kernels/params.h"

namespace anyflash {
namespace kvcache_append {

constexpr int kThreads = 128;

// Neighbouring elements of a row: 16 bytes in one access, or a single element.
template <typename T, int kCount>
union Piece {
  Words16 words;
  T values[kCount];
};

template <typename T, int kCount>
__device__ __forceinline__ Piece<T, kCount> load(const T* from) {
  Piece<T, kCount> piece;
  if constexpr (kCount == 1) {
    piece.values[0] = *from;
  } else {
    piece.words = ptx::load_16(from);
  }
  return piece;
}

template <typename T, int kCount>
__device__ __forceinline__ void store(T* to, const Piece<T, kCount>& piece) {
  if constexpr (kCount == 1) {
    *to = piece.values[0];
  } else {
    ptx::store_16(to, piece.words);
  }
}

// The columns before rotary_dim form pairs, (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin): this is
// what that does to the columns of one thread.
template <typename T, int kCount>
class Turn {
 public:
  // No rotation.
  __device__ __forceinline__ Turn() : neighbours_(true), distance_(0), cos_{}, sin_{} {}

  // At `position`, for the columns from `column` on.
  __device__ __forceinline__ Turn(const KvcacheAppendParams& p, int64_t position, int column)
      : neighbours_(p.interleaved), distance_(0), cos_{}, sin_{} {
    if (column >= p.rotary_dim) return;
    const int half = int(p.rotary_dim / 2);
    distance_ = p.interleaved ? 1 - column % 2 * 2 : column < half ? half : -half;
    // Queries may stand beyond the table; what they see there is the last angle.
    const int64_t row = smaller(larger<int64_t>(position, 0), p.seqlen_rotary - 1);
    const T* cos = static_cast<const T*>(p.rotary_cos) + row * p.rotary_cos_stride;
    const T* sin = static_cast<const T*>(p.rotary_sin) + row * p.rotary_sin_stride;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int at = column + i;
      const int pair = p.interleaved ? at / 2 : at % half;
      const bool second = p.interleaved ? at % 2 == 1 : at >= half;
      cos_[i] = to_fp32(cos[pair]);
      sin_[i] = second ? to_fp32(sin[pair]) : -to_fp32(sin[pair]);
    }
  }

  __device__ __forceinline__ Piece<T, kCount> of(const T* x) const {
    const Piece<T, kCount> own = load<T, kCount>(x);
    if (distance_ == 0) return own;
    const Piece<T, kCount> other =
        kCount > 1 && neighbours_ ? swapped(own) : load<T, kCount>(x + distance_);
    Piece<T, kCount> turned;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      from_fp32(to_fp32(own.values[i]) * cos_[i] + to_fp32(other.values[i]) * sin_[i],
                turned.values[i]);
    }
    return turned;
  }

 private:
  // (x[1], x[0], x[3], x[2], ...)
  __device__ __forceinline__ static Piece<T, kCount> swapped(const Piece<T, kCount>& x) {
    Piece<T, kCount> y;
#pragma unroll
    for (int i = 0; i + 1 < kCount; i += 2) {
      y.values[i] = x.values[i + 1];
      y.values[i + 1] = x.values[i];
    }
    return y;
  }

  bool neighbours_;
  int distance_;  // columns to the other member of the first column's pair; 0: columns are copied
  float cos_[kCount];
  float sin_[kCount];  // with the sign it has for this member
};

// The block copies `heads` rows of one token; make_turn(column) says how.
template <typename T, int kCount, typename MakeTurn>
__device__ __forceinline__ void move_token(const T* from, int64_t from_stride, T* to,
                                           int64_t to_stride, int64_t heads, int64_t columns,
                                           MakeTurn make_turn) {
  const int pieces = int(columns / kCount);
  const int across = smaller(pieces, kThreads);
  const int rows = kThreads / across;
  const int row = threadIdx.x / across;
  if (row >= rows) return;
  for (int piece = threadIdx.x % across; piece < pieces; piece += across) {
    const int column = piece * kCount;
    const Turn<T, kCount> turn = make_turn(column);
    for (int64_t head = row; head < heads; head += rows) {
      store<T, kCount>(to + head * to_stride + column, turn.of(from + head * from_stride + column));
    }
  }
}

template <typename T>
__device__ __forceinline__ T* token(const Rows& x, int64_t sequence, int64_t row) {
  return static_cast<T*>(x.data) + sequence * x.batch_stride + row * x.row_stride;
}

// A token of k and v, at position cache_seqlens[sequence] + row. One without a place in the cache
// is left out.
template <typename T, int kCount>
__device__ __forceinline__ void append_token(const KvcacheAppendParams& p, int64_t sequence,
                                             int64_t row) {
  const int64_t position = p.cache_seqlens[sequence] + row;
  if (position < 0 || position >= p.pages_per_sequence * p.page_size) return;
  const int64_t index = sequence * p.block_table_stride + position / p.page_size;
  const int64_t page = p.block_table ? p.block_table[index] : sequence;
  if (page < 0 || page >= p.num_pages) return;
  const int64_t page_row = position % p.page_size;

  move_token<T, kCount>(
      token<const T>(p.k, sequence, row), p.k.head_stride, token<T>(p.k_cache, page, page_row),
      p.k_cache.head_stride, p.heads_k, p.head_dim, [&](int column) {
        return p.rotary_cos ? Turn<T, kCount>(p, position, column) : Turn<T, kCount>();
      });
  move_token<T, kCount>(token<const T>(p.v, sequence, row), p.v.head_stride,
                        token<T>(p.v_cache, page, page_row), p.v_cache.head_stride, p.heads_k,
                        p.head_dim_v, [](int) { return Turn<T, kCount>(); });
}

template <typename T, int kCount>
__device__ __forceinline__ void rotate_query(const KvcacheAppendParams& p, int64_t sequence,
                                             int64_t row) {
  const int64_t position = p.cache_seqlens[sequence] + (p.q_positions_move ? row : 0);
  move_token<T, kCount>(token<const T>(p.q, sequence, row), p.q.head_stride,
                        token<T>(p.q_rotated, sequence, row), p.q_rotated.head_stride, p.heads,
                        p.head_dim,
                        [&](int column) { return Turn<T, kCount>(p, position, column); });
}

ANYFLASH_HOST_DEVICE int64_t tokens_per_sequence(const KvcacheAppendParams& p) {
  return p.seqlen_new + (p.rotary_cos ? p.seqlen_q : 0);
}

// Grid: (at most tokens, 1).
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads) kernel(KvcacheAppendParams p) {
  const int64_t per_sequence = tokens_per_sequence(p);
  for (int64_t i = blockIdx.x; i < p.batch * per_sequence; i += gridDim.x) {
    const int64_t sequence = i / per_sequence;
    const int64_t row = i % per_sequence;
    if (row == 0 && threadIdx.x == 0 && p.seqused_k) {
      p.seqused_k[sequence] = int32_t(p.cache_seqlens[sequence] + p.seqlen_new);
    }
    if (row < p.seqlen_new) {
      append_token<T, kCount>(p, sequence, row);
    } else {
      rotate_query<T, kCount>(p, sequence, row - p.seqlen_new);
    }
  }
}

// ---- launcher ----

// Whether every row of x starts at a multiple of 16 bytes.
template <typename T>
bool rows_aligned(const Rows& x) {
  constexpr int kPack = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch_stride % kPack == 0 &&
         x.row_stride % kPack == 0 && x.head_stride % kPack == 0;
}

// Whether rows are made of whole pieces of 16 bytes, each of which turns as a whole.
template <typename T>
bool vectorised(const KvcacheAppendParams& p) {
  constexpr int kPack = 16 / sizeof(T);
  const bool appends = p.head_dim % kPack == 0 && p.head_dim_v % kPack == 0 &&
                       rows_aligned<T>(p.k) && rows_aligned<T>(p.v) && rows_aligned<T>(p.k_cache) &&
                       rows_aligned<T>(p.v_cache);
  if (!p.rotary_cos) return appends;
  return appends && rows_aligned<T>(p.q) && rows_aligned<T>(p.q_rotated) &&
         (p.interleaved ? p.rotary_dim : p.rotary_dim / 2) % kPack == 0;
}

template <typename T>
int32_t launch(const KvcacheAppendParams& p, void* stream) {
  if (p.rotary_cos && p.seqlen_rotary < 1) return kErrorInvalidParams;
  const int64_t tokens = p.batch * tokens_per_sequence(p);
  if (tokens == 0) return 0;
  if (p.head_dim < 1 || p.head_dim_v < 1 || p.page_size < 1) return kErrorInvalidParams;
  constexpr int64_t kMostBlocks = 8192;  // fills any GPU a few times
  const Grid grid{uint32_t(smaller(tokens, kMostBlocks)), 1, kThreads};
  return vectorised<T>(p) ? launch_kernel(kernel<T, 16 / sizeof(T)>, grid, p, stream)
                          : launch_kernel(kernel<T, 1>, grid, p, stream);
}

}  // namespace kvcache_append
}  // namespace anyflash
