// What the backward does row by row: before the products log-sum-exp and delta of each query row,
// behind them the sums of dq rounded and stored.
#pragma once

#include "kernels/common/mma_tile.cuh"
#include "kernels/common/online_softmax.cuh"
#include "kernels/common/tile_copy.cuh"
#include "kernels/sm80/backward_arguments.h"
#include "kernels/sm80/backward_shapes.h"
#include "kernels/sm80/block.cuh"

namespace anyflash::sm80 {

constexpr int32_t kBackwardWarps = 8;
constexpr int32_t kBackwardThreads = kBackwardWarps * kWarpThreads;

// Of the sequence's query 0, among the numbers of all rows.
__device__ __forceinline__ int64_t first_number(const BackwardArguments& a, const Sequence& s,
                                                int32_t head) {
  const AttentionParams& p = a.attention;
  if (!p.cu_seqlens_q) return (s.index * p.heads + head) * a.padded_rows;
  return head * a.padded_rows +
         int64_t{PackedTile<kRowTile>::first(p.cu_seqlens_q, 1, s.index)} * kRowTile;
}

// The part of dq that each thread has of a tile of query rows, and where its sums lie: one number
// of all threads after the other, so that a warp adds to whole lines of the L2 cache.
template <int32_t kHeadDim, int32_t kSharedKb>
struct QuerySums {
  static constexpr KeyTileShape kShape = key_tile_shape(kHeadDim, kSharedKb);
  static constexpr int32_t kThreads = kBackwardThreads;
  static constexpr int32_t kSharedBytes = SwizzledTile<kHeadDim>::bytes(kShape.rows);
  static constexpr int32_t kColumnWarps = kBackwardWarps / kShape.query_warps;
  static constexpr int32_t kWarpRows = kShape.rows / kShape.query_warps;
  static constexpr int32_t kMTiles = kWarpRows / 16;
  static constexpr int32_t kNTiles = kHeadDim / kColumnWarps / 8;
  using Tile = Accumulator<kMTiles, kHeadDim / kColumnWarps>;

  // The thread's first number of a tile whose rows begin at `row` of all.
  __device__ __forceinline__ static float* of(float* sums, int64_t row, int32_t thread) {
    return sums + row * kHeadDim + thread % kWarpThreads +
           thread / kWarpThreads * (kMTiles * kNTiles * 4 * kWarpThreads);
  }
  __device__ __forceinline__ static constexpr int32_t offset(int32_t m, int32_t n, int32_t i) {
    return ((m * kNTiles + n) * 4 + i) * kWarpThreads;
  }
};

// Stages a warp's part of a tile of kColumns in shared memory, rounded: rows from first_row on, and
// of the columns every kColumnWarps-th 16, from the column_warp-th on.
template <typename T, int32_t kColumns, int32_t kColumnWarps, int32_t kMTiles, int32_t kNTiles>
__device__ __forceinline__ void stage(const float (&x)[kMTiles][kNTiles][4], float factor,
                                      uint32_t tile, int32_t first_row, int32_t column_warp,
                                      int32_t lane) {
  using Layout = SwizzledTile<kColumns>;
  const TileReader<kColumns> place{tile + Layout::offset(first_row + lane / 4, 2 * column_warp) +
                                   lane % 4 * 4};
  for_pairs(x, [&](int32_t m, int32_t n, int32_t h) {
    ptx::store_shared_4(place.at_chunk(16 * m + 8 * h, n / 2 * 2 * kColumnWarps + n % 2),
                        ptx::pack(T{}, x[m][n][2 * h] * factor, x[m][n][2 * h + 1] * factor));
  });
}

// What the threads of a block have, added up, in thread 0.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float of_warps[kBackwardWarps];
  const int32_t thread = int32_t(threadIdx.x);
  x = warp_sum(x);
  if (thread % kWarpThreads == 0) of_warps[thread / kWarpThreads] = x;
  __syncthreads();
  float sum = 0;
  for (int32_t warp = 0; warp < kBackwardWarps; ++warp) sum += of_warps[warp];
  return sum;
}

// A block has kRowTile rows of one head. Threads share a row by eights of its columns.
template <typename T, int32_t kHeadDim, int32_t kHeadDimV>
__global__ void __launch_bounds__(kBackwardThreads) prepare_kernel(const BackwardArguments a) {
  constexpr int32_t kRowThreads = kHeadDimV <= 64 ? 8 : kHeadDimV <= 128 ? 16 : 32;
  const AttentionParams& p = a.attention;
  const Block block = Block::of<kRowTile>(a);
  const Sequence& s = block.sequence;
  const int32_t thread = int32_t(threadIdx.x), head = block.first_head;
  const int64_t first = first_number(a, s, head) + block.row_begin;
  float dsink = 0;
  if (block.has_rows(a)) {
    if (a.dq_sums) {
      auto* sums = reinterpret_cast<uint32_t*>(a.dq_sums + first * kHeadDim);
      for (int32_t i = thread; i < kRowTile * kHeadDim / 4; i += kBackwardThreads) {
        ptx::store_16(sums + 4 * i, {});
      }
    }
    const bool packed = p.cu_seqlens_q != nullptr;
    const int32_t rows = s.index == p.batch ? 0 : s.seqlen_q;  // behind the last nothing is read
    const int32_t lane = thread % kRowThreads;
    const bool has_columns = 8 * lane < p.head_dim_v;
    const StridedRows out = strided_rows(p.out, packed, s.index, s.first_q, head);
    const StridedRows dout = strided_rows(p.dout, packed, s.index, s.first_q, head);
    for (int32_t r = thread / kRowThreads; r < kRowTile; r += kBackwardThreads / kRowThreads) {
      const int32_t row = block.row_begin + r;
      const bool exists = row < rows;
      float delta = 0;
      if (exists && has_columns) {
        const Words16 x = ptx::load_16(out[row] + 16 * lane);
        const Words16 dx = ptx::load_16(dout[row] + 16 * lane);
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
          delta += to_fp32(T{uint16_t(x.w[i])}) * to_fp32(T{uint16_t(dx.w[i])});
          delta += to_fp32(T{uint16_t(x.w[i] >> 16)}) * to_fp32(T{uint16_t(dx.w[i] >> 16)});
        }
      }
#pragma unroll
      for (int32_t lanes = kRowThreads / 2; lanes > 0; lanes /= 2) {
        delta += ptx::shuffle_xor(delta, lanes);
      }
      if (lane != 0) continue;
      float lse = infinity();
      if (exists) {
        lse = statistics_of(p, p.lse, s, head)[row];
        if (p.dlse.data) delta -= statistics_of(p, p.dlse, s, head)[row];
        if (lse == infinity()) delta = 0;  // no probabilities, whatever the gradients are
        const bool left_out = a.references && is_far(lse);  // to far_rows_kernel
        if (a.dsinks_parts && !left_out) dsink -= ptx::ex2((p.sinks[head] - lse) * kLog2e) * delta;
      }
      a.rows[first + r] = {(lse - a.score.origin) * kLog2e, delta};
    }
  }
  if (!a.dsinks_parts) return;
  dsink = block_sum(dsink);
  if (thread == 0) a.dsinks_parts[first / kRowTile] = dsink;
}

// A block adds up one head's parts, in an order that is always the same.
template <typename T>
__global__ void __launch_bounds__(kWarpThreads) sinks_kernel(const BackwardArguments a) {
  const AttentionParams& p = a.attention;
  const int32_t head = int32_t(blockIdx.x);
  const int64_t tiles = a.padded_rows / kRowTile, sequences = p.cu_seqlens_q ? 1 : p.batch;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < sequences * tiles; i += kWarpThreads) {
    sum += a.dsinks_parts[(i / tiles * p.heads + head) * tiles + i % tiles];
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) p.dsinks[head] = sum;
}

// A block has kRowTile rows of one head.
template <typename T, int32_t kHeadDim, int32_t kSharedKb>
__global__ void __launch_bounds__(kBackwardThreads) finish_kernel(const BackwardArguments a) {
  using Sums = QuerySums<kHeadDim, kSharedKb>;
  constexpr int32_t kRows = Sums::kShape.rows;
  extern __shared__ __align__(128) unsigned char shared[];
  const AttentionParams& p = a.attention;
  const Block block = Block::of<kRowTile>(a);
  const Sequence& s = block.sequence;
  if (!block.has_rows(a)) return;
  const int32_t thread = int32_t(threadIdx.x), warp = thread / kWarpThreads;
  const TileCopy<kRows, kHeadDim, kBackwardThreads> copy(thread);
  const int64_t first = first_number(a, s, block.first_head);
  const StridedRows rows =
      strided_rows(p.dq, p.cu_seqlens_q != nullptr, s.index, s.first_q, block.first_head);
  const int32_t end = smaller(block.row_begin + kRowTile, s.seqlen_q);
  for (int32_t row = block.row_begin; row < end; row += kRows) {
    const float* sums = Sums::of(a.dq_sums, first + row, thread);
    typename Sums::Tile dq;
#pragma unroll
    for (int32_t m = 0; m < Sums::kMTiles; ++m) {
#pragma unroll
      for (int32_t n = 0; n < Sums::kNTiles; ++n) {
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) dq[m][n][i] = sums[Sums::offset(m, n, i)];
      }
    }
    // The tile before is stored.
    __syncthreads();
    stage<T, kHeadDim, Sums::kColumnWarps>(dq, float(p.softmax_scale), ptx::shared_address(shared),
                                           warp % Sums::kShape.query_warps * Sums::kWarpRows,
                                           warp / Sums::kShape.query_warps, thread % kWarpThreads);
    __syncthreads();
    copy.store(shared, copy.place(rows, row), s.seqlen_q - row, int32_t(p.head_dim));
  }
}

}  // namespace anyflash::sm80
