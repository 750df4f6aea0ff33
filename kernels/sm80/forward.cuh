// Attention forward for sm_80 and newer: mma.sync, cp.async, one block per tile of query rows of
// one head. The method is FlashAttention-2's (Dao, arXiv:2307.08691); docs/kernels/sm80.md draws
// tiles, pipeline and swizzle.
//
// A block walks over its key tiles from the last to the first, so that the tiles in which a mask
// hides something come first and (with a left window) last, and the loop between them has no mask.
// Keys and values have one buffer each: while one product runs, the operand of the other arrives.
//
//   tensor cores   Q K[n]            P V[n]     Q K[n-1]        ...
//   copies         V[n]      K[n-1]             V[n-1]          ...
//   other units             softmax                    softmax
#pragma once

#include "kernels/common/mma_tile.cuh"
#include "kernels/common/scores.cuh"
#include "kernels/common/sequence.cuh"
#include "kernels/common/tile_copy.cuh"
#include "kernels/sm80/arguments.h"

namespace anyflash::sm80 {

struct TileShape {
  int32_t rows;
  int32_t keys;
  int32_t warps;  // share the rows
};

// Shared memory holds one tile each of queries, keys and values: at most 99 KB, what every GPU from
// sm_80 on gives a block. What extras take of registers is missing for scores.
ANYFLASH_HOST_DEVICE constexpr TileShape tile_shape(int32_t max_head_dim, Extras extras) {
  switch (max_head_dim) {
    case 64:
      return {128, extras == Extras::none ? 96 : 64, 4};
    case 96:
      return {128, 64, 4};
    case 128:
      return {128, extras == Extras::dropout ? 32 : 64, 4};
    case 192:
      return {128, 64, 8};
    default:
      return {64, 64, 4};
  }
}

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras, bool kPaged>
class ForwardTile {
 public:
  static constexpr TileShape kShape = tile_shape(kHeadDim, kExtras);
  static constexpr int32_t kThreads = kWarpThreads * kShape.warps;
  static constexpr int32_t kBlocks = 8 / kShape.warps;  // per multiprocessor, by registers
  static constexpr int32_t kWarpRows = kShape.rows / kShape.warps;
  static constexpr int32_t kMTiles = kWarpRows / 16;

  using QueryTile = SwizzledTile<kHeadDim>;
  using ValueTile = SwizzledTile<kHeadDimV>;
  static constexpr int32_t kQueryBytes = QueryTile::bytes(kShape.rows);
  static constexpr int32_t kKeyBytes = QueryTile::bytes(kShape.keys);
  static constexpr int32_t kSharedBytes = kQueryBytes + kKeyBytes + ValueTile::bytes(kShape.keys);

  __device__ __forceinline__ ForwardTile(const ForwardArguments& arguments,
                                         const Sequence& sequence, int32_t head, int32_t row_begin,
                                         unsigned char* shared)
      : a_(arguments),
        p_(arguments.attention),
        s_(sequence),
        head_(head),
        row_begin_(row_begin),
        thread_(threadIdx.x),
        lane_(thread_ % kWarpThreads),
        warp_(thread_ / kWarpThreads),
        shared_(shared),
        keys_(p_, p_.k, a_.page_size, s_, head / int32_t(p_.heads / p_.heads_k)),
        values_(p_, p_.v, a_.page_size, s_, head / int32_t(p_.heads / p_.heads_k)),
        mask_{s_.seqlen_q, s_.seqlen_k, a_.score.window_left, a_.score.window_right},
        dropout_{0, 0, a_.score.dropout_threshold} {
    if (kExtras == Extras::dropout && p_.rng_state) {  // without: pages with other extras
      dropout_.seed = uint64_t(p_.rng_state[0]);
      dropout_.offset = uint32_t(p_.rng_state[1]);
    }
    clear(out_);
  }

  // Out and log-sum-exp of all keys, in registers.
  __device__ __forceinline__ void attend() {
    const int32_t row_end = smaller(row_begin_ + kShape.rows, s_.seqlen_q);
    const TileRange<int32_t> some = mask_.tiles(row_begin_, row_end, kShape.keys);
    const TileRange<int32_t> all = mask_.full_tiles(row_begin_, row_end, kShape.keys);
    if (some.begin >= some.end) return;
    begin_ = some.begin;
    load_queries();
    load_keys<false>(some.end - 1);
    for (int32_t tile = some.end - 1; tile >= begin_;) {
      const int32_t masked_end = tile >= all.end ? larger(all.end, begin_) : begin_;
      for (; tile >= masked_end; --tile) step<true>(tile);
      for (; tile >= all.begin && tile >= begin_; --tile) step<false>(tile);
    }
  }

  __device__ __forceinline__ void write() {
    const float sink = p_.sinks ? p_.sinks[head_] : -infinity();
    float* lse = statistics_of(p_, p_.lse, s_, head_);
    unsigned char* slice = shared_ + QueryTile::bytes(warp_ * kWarpRows);
#pragma unroll
    for (int32_t m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int32_t h = 0; h < 2; ++h) {
        const RowResult result =
            finish_row(softmax_.max[m][h] * a_.score.logit, quad_sum(softmax_.sum[m][h]), sink);
        if (lane_ % 4 == 0 && row(m, h) < s_.seqlen_q) lse[row(m, h)] = result.lse;
        const float factor = kExtras == Extras::dropout ? result.inverse_sum * a_.score.keep_scale
                                                        : result.inverse_sum;
        stage_row(slice, m, h, factor);
      }
    }
    __syncwarp();
    const TileCopy<kWarpRows, kHeadDimV, kWarpThreads> copy(lane_);
    const StridedRows rows =
        strided_rows(p_.out, p_.cu_seqlens_q != nullptr, s_.index, s_.first_q, head_);
    copy.store(slice, rows, row_begin_ + warp_ * kWarpRows, s_.seqlen_q, p_.head_dim_v);
  }

 private:
  using Copy = TileCopy<kShape.keys, kHeadDim, kThreads>;
  using CopyV = TileCopy<kShape.keys, kHeadDimV, kThreads>;

  __device__ __forceinline__ int32_t row(int32_t m, int32_t h) const {
    return row_begin_ + warp_ * kWarpRows + 16 * m + 8 * h + lane_ / 4;
  }

  __device__ __forceinline__ uint32_t query_tile() const { return ptx::shared_address(shared_); }
  __device__ __forceinline__ uint32_t key_tile() const { return query_tile() + kQueryBytes; }
  __device__ __forceinline__ uint32_t value_tile() const { return key_tile() + kKeyBytes; }

  __device__ __forceinline__ void load_queries() {
    const StridedRows rows =
        strided_rows(p_.q, p_.cu_seqlens_q != nullptr, s_.index, s_.first_q, head_);
    TileCopy<kShape.rows, kHeadDim, kThreads>(thread_).template load<false>(
        query_tile(), rows, row_begin_, s_.seqlen_q, p_.head_dim);
  }

  // kWhole: the tile does not reach beyond the last key.
  template <bool kWhole>
  __device__ __forceinline__ void load_keys(int32_t tile) {
    Copy(thread_).template load<kWhole>(key_tile(), keys_, tile * kShape.keys, s_.seqlen_k,
                                        p_.head_dim);
    ptx::cp_async_commit();
  }

  template <bool kWhole>
  __device__ __forceinline__ void load_values(int32_t tile) {
    CopyV(thread_).template load<kWhole>(value_tile(), values_, tile * kShape.keys, s_.seqlen_k,
                                         p_.head_dim_v);
    ptx::cp_async_commit();
  }

  // All keys of a tile. What arrives is waited for by the thread that asked for it, then by the
  // others at the barrier, behind which nobody reads the buffer that is filled next.
  template <bool kMasked>
  __device__ __forceinline__ void step(int32_t tile) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    load_values<!kMasked>(tile);

    Accumulator<kMTiles, kShape.keys> scores;
    multiply_keys<T>(scores, query_reader<kHeadDim>(query_tile(), warp_ * kWarpRows, lane_),
                     key_reader<kHeadDim>(key_tile(), lane_));

    ptx::cp_async_wait<0>();
    __syncthreads();
    if (tile > begin_) load_keys<true>(tile - 1);

    const int32_t first_key = tile * kShape.keys + lane_ % 4 * 2;
    if constexpr (kExtras != Extras::none) modify(scores, first_key);
    if constexpr (kMasked) hide(scores, first_key);
    softmax_.update(scores, out_, a_.score.exponent);
    if (kExtras == Extras::dropout && dropout_.threshold > 0) {
      drop(scores, dropout_, uint32_t(s_.index * int32_t(p_.heads) + head_), row(0, 0), first_key);
    }
    multiply_values<T>(out_, scores, value_reader<kHeadDimV>(value_tile(), lane_));
  }

  __device__ __forceinline__ void hide(Accumulator<kMTiles, kShape.keys>& scores,
                                       int32_t first_key) {
    KeyInterval visible[2 * kMTiles];
#pragma unroll
    for (int32_t r = 0; r < 2 * kMTiles; ++r) {
      visible[r] = {mask_.kv_begin(row(r / 2, r % 2)), mask_.kv_end(row(r / 2, r % 2))};
    }
    hide_keys(scores, first_key, visible);
  }

  __device__ __forceinline__ void modify(Accumulator<kMTiles, kShape.keys>& scores,
                                         int32_t first_key) {
    float slope = 0;
    if (p_.alibi_slopes) slope = p_.alibi_slopes[s_.index * p_.alibi_batch_stride + head_];
    AlibiRow alibi[2 * kMTiles];
#pragma unroll
    for (int32_t r = 0; r < 2 * kMTiles; ++r) {
      alibi[r] = {slope, row(r / 2, r % 2) + mask_.shift()};
    }
    modify_scores(scores, first_key, alibi, a_.score);
  }

  // One row of the thread into the warp's slice of the query tile, which has no reader left.
  __device__ __forceinline__ void stage_row(unsigned char* slice, int32_t m, int32_t h,
                                            float factor) {
#pragma unroll
    for (int32_t n = 0; n < kHeadDimV / 8; ++n) {
      unsigned char* chunk = slice + ValueTile::offset(16 * m + 8 * h + lane_ / 4, n);
      reinterpret_cast<uint32_t*>(chunk)[lane_ % 4] =
          ptx::pack(T{}, out_[m][n][2 * h] * factor, out_[m][n][2 * h + 1] * factor);
    }
  }

  const ForwardArguments& a_;
  const AttentionParams& p_;
  const Sequence s_;
  const int32_t head_;
  const int32_t row_begin_;
  const int32_t thread_;
  const int32_t lane_;
  const int32_t warp_;
  unsigned char* const shared_;
  const KeyRows<kPaged> keys_;
  const KeyRows<kPaged> values_;
  const IntervalMask<int32_t> mask_;
  Dropout dropout_;
  int32_t begin_ = 0;  // of the key tiles
  Accumulator<kMTiles, kHeadDimV> out_;
  OnlineSoftmax<kMTiles> softmax_;
};

// Grid: row tiles (of the longest sequence) x heads x sequences, in one dimension, which has room
// for 2^31 - 1 blocks. Under a causal mask the last rows see most keys, so they come first.
template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras, bool kPaged>
__global__ void __launch_bounds__(ForwardTile<T, kHeadDim, kHeadDimV, kExtras, kPaged>::kThreads,
                                  ForwardTile<T, kHeadDim, kHeadDimV, kExtras, kPaged>::kBlocks)
    forward_kernel(const ForwardArguments a) {
  using Tile = ForwardTile<T, kHeadDim, kHeadDimV, kExtras, kPaged>;
  extern __shared__ __align__(128) unsigned char shared[];
  const int32_t heads = int32_t(a.attention.heads);
  const int32_t block = int32_t(blockIdx.x);
  const int32_t sequence_and_head = block / a.row_tiles;
  const int32_t row_tile = a.row_tiles - 1 - (block - sequence_and_head * a.row_tiles);
  const Sequence s = sequence_of(a.attention, sequence_and_head / heads);
  if (row_tile * Tile::kShape.rows >= s.seqlen_q) return;
  Tile tile(a, s, sequence_and_head % heads, row_tile * Tile::kShape.rows, shared);
  tile.attend();
  tile.write();
}

}  // namespace anyflash::sm80
