// Attention forward: mma.sync, one block per tile of query rows, whose keys and values come by
// cp.async, or on sm_75, which has none, through registers. The method is FlashAttention-2's (Dao,
// arXiv:2307.08691); docs/kernels/sm80.md draws tiles, pipeline and swizzle.
//
// A block walks over its key tiles from the last to the first. Keys and values have one buffer
// each: while one product runs, the operand of the other arrives.
//
//   tensor cores   Q K[n]            P V[n]     Q K[n-1]        ...
//   copies         V[n]      K[n-1]             V[n-1]          ...
//   other units             softmax                    softmax
//
// Rows of a tile are a head's queries; where these are too few to fill tiles, those of all heads
// that share a key head, token by token. Where blocks are too few for the GPU, the keys are cut
// into parts, whose results combine_kernel combines.
#pragma once

#include "kernels/common/mma_tile.cuh"
#include "kernels/common/scores.cuh"
#include "kernels/sm80/combine.cuh"
#include "kernels/sm80/key_tiles.cuh"
#include "kernels/sm80/tile_shapes.h"

namespace anyflash::sm80 {

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras, bool kPaged,
          int32_t kSharedKb>
class ForwardTile {
 public:
  static constexpr TileShape kShape = tile_shape(kHeadDim, kSharedKb);
  static constexpr int32_t kThreads = kWarpThreads * kShape.warps;
  static constexpr int32_t kWarpRows = kShape.rows / kShape.warps;
  static constexpr int32_t kMTiles = kWarpRows / 16;

  using QueryTile = SwizzledTile<kHeadDim>;
  using ValueTile = SwizzledTile<kHeadDimV>;
  static constexpr int32_t kQueryBytes = QueryTile::bytes(kShape.rows);
  static constexpr int32_t kKeyBytes = QueryTile::bytes(kShape.keys);

  // What a block's threads have in common. In shared memory, because all registers are for scores
  // and results.
  struct Common {
    Block block;
    float slope;  // of ALiBi, in units of the scores
    Dropout dropout;
    const char* bias;
    KeyPages<kPaged> pages;

    __device__ __forceinline__ Common(const Arguments& a, const Block& found)
        : block(found),
          slope(0),
          dropout{0, 0, a.score.dropout_threshold},
          bias(nullptr),
          pages(a, found) {
      const AttentionParams& p = a.attention;
      const int32_t sequence = found.sequence.index;
      if (modifies_scores(kExtras) && p.alibi_slopes && sequence < p.batch) {
        slope = p.alibi_slopes[sequence * p.alibi_batch_stride + found.first_head] *
                a.score.inverse_unit;
      }
      if (drops(kExtras) && p.rng_state) {  // without: what else only Extras::all has
        dropout.seed = uint64_t(p.rng_state[0]);
        dropout.offset = uint32_t(p.rng_state[1]);
      }
      if (kExtras == Extras::all) bias = bias_of(p, sequence, found.first_head);
    }
  };

  // What is common, in front of queries, keys and values. On sm_75 these fill shared memory, so
  // that each thread has it in registers.
  static constexpr int32_t kCommonBytes = kSharedKb < kLeastSharedKb ? 0 : 128;
  static_assert(kCommonBytes == 0 || sizeof(Common) <= kCommonBytes);
  static constexpr int32_t kSharedBytes =
      kCommonBytes + kQueryBytes + kKeyBytes + ValueTile::bytes(kShape.keys);

  __device__ __forceinline__ ForwardTile(const Arguments& arguments, const Common& common,
                                         unsigned char* shared)
      : a_(arguments),
        p_(arguments.attention),
        c_(common),
        b_(common.block),
        s_(common.block.sequence),
        thread_(threadIdx.x),
        lane_(thread_ % kWarpThreads),
        warp_(thread_ / kWarpThreads),
        shared_(shared),
        some_(part_of(mask().tiles(first_token(), end_token(), kShape.keys))),
        whole_(mask().full_tiles(first_token(), end_token(), kShape.keys)),
        tiles_(a_, b_, c_.pages, thread_, (some_.end - 1) * kShape.keys),
        query_reader_(query_reader<kHeadDim>(query_tile(), warp_ * kWarpRows, lane_)),
        key_reader_(key_reader<kHeadDim>(key_tile(), lane_)),
        value_reader_(value_reader<kHeadDimV>(value_tile(), lane_)),
        softmax_(a_.score.floor) {
    clear(out_);
  }

  // Out and log-sum-exp of the part's keys, in registers.
  __device__ __forceinline__ void attend() {
    if (some_.begin >= some_.end) return;
    int32_t tile = some_.end - 1;
    tiles_.find(tile * kShape.keys);
    load_queries();
    load_keys<false>(tile);
    await_keys();
    load_values<false>(tile);
    for (; tile > some_.begin; --tile) step<false>(tile);
    step<true>(tile);
  }

  __device__ __forceinline__ void write() {
    const bool in_parts = b_.in_parts(a_);
    unsigned char* slice = shared_ + QueryTile::bytes(warp_ * kWarpRows);
#pragma unroll
    for (int32_t m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int32_t h = 0; h < 2; ++h) {
        const float max = logit(a_.score, softmax_.max[m][h]);
        const float sum = quad_sum(softmax_.sum[m][h]);
        const int32_t query = token(row(m, h)), query_head = head(row(m, h));
        const bool exists = query < s_.seqlen_q;
        const float sink = p_.sinks && exists && !in_parts ? p_.sinks[query_head] : -infinity();
        const RowResult result = finish_row(max, sum, sink);
        const float factor =
            drops(kExtras) ? result.inverse_sum * a_.score.keep_scale : result.inverse_sum;
        if (in_parts) {
          if (!exists) continue;
          const int64_t part = part_row(p_, b_.split, s_.index, query_head, query);
          write_part_row(m, h, part, result.lse, factor);
          continue;
        }
        if (lane_ % 4 == 0 && exists) {
          statistics_of(p_, p_.lse, s_, query_head)[query] = result.lse;
        }
        stage_row(slice, m, h, factor);
      }
    }
    if (in_parts) return;
    __syncwarp();
    const TileCopy<kWarpRows, kHeadDimV, kWarpThreads> copy(lane_);
    const GroupRows rows(p_, p_.out, a_.group, s_, b_.first_head);
    const int32_t first = b_.row_begin + warp_ * kWarpRows;
    copy.store(slice, copy.place(rows, first), num_rows() - first, int32_t(p_.head_dim_v));
  }

 private:
  using Copy = TileCopy<kShape.keys, kHeadDim, kThreads>;
  using CopyV = TileCopy<kShape.keys, kHeadDimV, kThreads>;

  // Rows of the sequence and group, of which the thread has some.
  __device__ __forceinline__ int32_t num_rows() const {
    return s_.seqlen_q * int32_t(a_.group.value);
  }
  __device__ __forceinline__ int32_t row(int32_t m, int32_t h) const {
    return b_.row_begin + warp_ * kWarpRows + 16 * m + 8 * h + lane_ / 4;
  }
  __device__ __forceinline__ int32_t token(int32_t row) const {
    return int32_t(a_.group.quotient(uint32_t(row)));
  }
  __device__ __forceinline__ int32_t head(int32_t row) const {
    return b_.first_head + row - token(row) * int32_t(a_.group.value);
  }
  __device__ __forceinline__ IntervalMask<int32_t> mask() const {
    return {s_.seqlen_q, s_.seqlen_k, a_.score.window_left, a_.score.window_right};
  }
  __device__ __forceinline__ int32_t first_token() const { return token(b_.row_begin); }
  __device__ __forceinline__ int32_t end_token() const {
    return smaller(token(b_.row_begin + kShape.rows - 1) + 1, s_.seqlen_q);
  }

  __device__ __forceinline__ uint32_t query_tile() const { return ptx::shared_address(shared_); }
  __device__ __forceinline__ uint32_t key_tile() const { return query_tile() + kQueryBytes; }
  __device__ __forceinline__ uint32_t value_tile() const { return key_tile() + kKeyBytes; }

  // The key tiles of part `split`.
  __device__ __forceinline__ TileRange<int32_t> part_of(const TileRange<int32_t>& tiles) const {
    const int32_t each = (larger(tiles.end - tiles.begin, 0) + a_.splits - 1) / a_.splits;
    const int32_t begin = tiles.begin + b_.split * each;
    return {begin, smaller(begin + each, tiles.end)};
  }

  __device__ __forceinline__ void load_queries() {
    const TileCopy<kShape.rows, kHeadDim, kThreads> copy(thread_);
    GroupRows rows = copy.place(GroupRows(p_, p_.q, a_.group, s_, b_.first_head), b_.row_begin);
    TileOnItsWay<decltype(copy)> queries;
    queries.template start<false>(copy, query_tile(), rows, num_rows() - b_.row_begin,
                                  int32_t(p_.head_dim));
    // By cp.async they arrive with the first keys.
    if (!ptx::kHasCpAsync) queries.finish(copy, query_tile());
  }

  // kWhole: the tile does not reach beyond the last key, as only the last tile does.
  template <bool kWhole>
  __device__ __forceinline__ void load_keys(int32_t tile) {
    key_transfer_.template start<kWhole>(Copy(thread_), key_tile(), tiles_.keys(),
                                         s_.seqlen_k - tile * kShape.keys, int32_t(p_.head_dim));
  }
  template <bool kWhole>
  __device__ __forceinline__ void load_values(int32_t tile) {
    value_transfer_.template start<kWhole>(CopyV(thread_), value_tile(), tiles_.values(),
                                           s_.seqlen_k - tile * kShape.keys,
                                           int32_t(p_.head_dim_v));
    tiles_.next((tile - 1) * kShape.keys, -1);
  }

  // What was asked for is there for every thread, and behind it nobody reads the buffer that is
  // filled next.
  __device__ __forceinline__ void await_keys() const {
    key_transfer_.finish(Copy(thread_), key_tile());
    __syncthreads();
  }
  __device__ __forceinline__ void await_values() const {
    value_transfer_.finish(CopyV(thread_), value_tile());
    __syncthreads();
  }

  // All keys of a tile; meanwhile the one before arrives, unless it is the last.
  template <bool kLast>
  __device__ __forceinline__ void step(int32_t tile) {
    Accumulator<kMTiles, kShape.keys> scores;
    multiply_keys<T>(scores, query_reader_, key_reader_);
    await_values();
    if (!kLast && ptx::kHasCpAsync) load_keys<true>(tile - 1);

    const int32_t first_key = tile * kShape.keys + lane_ % 4 * 2;
    if constexpr (modifies_scores(kExtras)) modify(scores, first_key);
    if (tile < whole_.begin || tile >= whole_.end) hide(scores, tile, first_key);
    softmax_.template update<kExtras == Extras::all>(scores, out_, a_.score.exponent);
    if (drops(kExtras) && a_.score.dropout_threshold > 0) {
      drop(scores, c_.dropout, uint32_t(s_.index * int32_t(p_.heads) + b_.first_head), row(0, 0),
           first_key, [](float) { return 0.0f; });
    }
    // Registers are for the keys only while the product runs.
    if (!kLast && !ptx::kHasCpAsync) load_keys<true>(tile - 1);
    multiply_values<T>(out_, scores, value_reader_);
    if (!kLast) {
      await_keys();
      load_values<true>(tile - 1);
    }
  }

  // Out of line of the other tiles: a branch that all threads take or leave.
  __device__ __forceinline__ void hide(Accumulator<kMTiles, kShape.keys>& scores, int32_t tile,
                                       int32_t first_key) {
    int32_t limit[2 * kMTiles];
    if (tile >= whole_.end) {
#pragma unroll
      for (int32_t r = 0; r < 2 * kMTiles; ++r) limit[r] = mask().kv_end(token(row(r / 2, r % 2)));
      hide_keys(scores, first_key, [&](int32_t r, int32_t key) { return key < limit[r]; });
    }
    if (tile < whole_.begin) {
#pragma unroll
      for (int32_t r = 0; r < 2 * kMTiles; ++r)
        limit[r] = mask().kv_begin(token(row(r / 2, r % 2)));
      hide_keys(scores, first_key, [&](int32_t r, int32_t key) { return key >= limit[r]; });
    }
  }

  __device__ __forceinline__ void modify(Accumulator<kMTiles, kShape.keys>& scores,
                                         int32_t first_key) {
    modify_scores<kExtras == Extras::all>(scores, a_.score);
    if (p_.alibi_slopes) add_slopes(scores, first_key);
    if (kExtras == Extras::all && p_.bias) {
      add_bias(scores, p_, a_.score, c_.bias, row(0, 0), first_key, s_.seqlen_q, s_.seqlen_k);
    }
  }

  __device__ __forceinline__ void add_slopes(Accumulator<kMTiles, kShape.keys>& scores,
                                             int32_t first_key) {
    float slope[2 * kMTiles];
    int32_t diagonal[2 * kMTiles];
#pragma unroll
    for (int32_t r = 0; r < 2 * kMTiles; ++r) {
      slope[r] = c_.slope;
      diagonal[r] = row(r / 2, r % 2) + mask().shift();
    }
    add_alibi(scores, first_key, slope, diagonal, a_.score.alibi_by_key);
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

  __device__ __forceinline__ void write_part_row(int32_t m, int32_t h, int64_t at, float lse,
                                                 float factor) {
    if (lane_ % 4 == 0) a_.part_lse[at] = lse;
    float* out = a_.part_out + at * p_.head_dim_v + lane_ % 4 * 2;
#pragma unroll
    for (int32_t n = 0; n < kHeadDimV / 8; ++n) {
      if (8 * n >= p_.head_dim_v) break;
      out[8 * n] = out_[m][n][2 * h] * factor;
      out[8 * n + 1] = out_[m][n][2 * h + 1] * factor;
    }
  }

  const Arguments& a_;
  const AttentionParams& p_;
  const Common& c_;
  const Block& b_;
  const Sequence& s_;
  const uint32_t thread_;
  const int32_t lane_;
  const int32_t warp_;
  unsigned char* const shared_;
  const TileRange<int32_t> some_;   // key tiles of the part in which some row sees a key
  const TileRange<int32_t> whole_;  // key tiles of which every row sees every key
  KeyTiles<kPaged, Copy, CopyV> tiles_;
  TileOnItsWay<Copy> key_transfer_;
  TileOnItsWay<CopyV> value_transfer_;
  const TileReader<kHeadDim> query_reader_;
  const TileReader<kHeadDim> key_reader_;
  const TileReader<kHeadDimV> value_reader_;
  OnlineSoftmax<kMTiles> softmax_;
  Accumulator<kMTiles, kHeadDimV> out_;
};

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras, bool kPaged,
          int32_t kSharedKb>
__global__ void __launch_bounds__(
    ForwardTile<T, kHeadDim, kHeadDimV, kExtras, kPaged, kSharedKb>::kThreads)
    forward_kernel(const Arguments a) {
  using Tile = ForwardTile<T, kHeadDim, kHeadDimV, kExtras, kPaged, kSharedKb>;
  if constexpr (kExtras == Extras::all || runs_here(tile_shape, kHeadDim, kSharedKb)) {
    extern __shared__ __align__(128) unsigned char shared[];
    using Common = typename Tile::Common;
    const Block block = Block::of<Tile::kShape.rows>(a);
    if (!block.has_rows(a)) return;
    if constexpr (Tile::kCommonBytes == 0) {
      const Common common(a, block);
      Tile tile(a, common, shared);
      tile.attend();
      tile.write();
    } else {
      auto* common = reinterpret_cast<Common*>(shared);
      if (threadIdx.x == 0) *common = Common(a, block);
      __syncthreads();
      Tile tile(a, *common, shared + Tile::kCommonBytes);
      tile.attend();
      tile.write();
    }
  } else {
    ptx::trap();
  }
}

}  // namespace anyflash::sm80
