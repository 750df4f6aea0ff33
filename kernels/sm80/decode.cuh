// Attention of few query rows over many keys, for sm_80 and newer: bound by the memory that keys
// and values come from.
//
// A block has 16 rows, the queries of all heads that share a key head, and a part of the keys. Its
// warps go different ways: each takes every fourth tile of keys through buffers of its own and
// needs no other warp until the end, when their results are combined. Where there are too few
// blocks for the GPU, the keys are cut into parts whose results a second kernel combines.
#pragma once

#include "kernels/common/mma_tile.cuh"
#include "kernels/common/scores.cuh"
#include "kernels/sm80/combine.cuh"
#include "kernels/sm80/key_tiles.cuh"

namespace anyflash::sm80 {

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras, bool kPaged>
class DecodeTile {
 public:
  static constexpr int32_t kWarps = 4;
  static constexpr int32_t kThreads = kWarps * kWarpThreads;
  static constexpr int32_t kRows = int32_t(kDecodeRows);
  // 8 KB of keys and as much of values on their way per warp.
  static constexpr int32_t kKeys = kHeadDim <= 64 ? 64 : kHeadDim <= 128 ? 32 : 16;

  using KeyTile = SwizzledTile<kHeadDim>;
  using ValueTile = SwizzledTile<kHeadDimV>;
  static constexpr int32_t kQueryBytes = KeyTile::bytes(kRows);
  static constexpr int32_t kKeyBytes = KeyTile::bytes(kKeys);
  static constexpr int32_t kWarpBytes = kKeyBytes + ValueTile::bytes(kKeys);
  // The warps' results, in place of keys and values: rows a few banks apart.
  static constexpr int32_t kOutPitch = kHeadDimV + 8;
  static constexpr int32_t kOutBytes = kWarps * kRows * kOutPitch * int32_t(sizeof(float));
  static constexpr int32_t kSharedBytes = kQueryBytes + larger(kWarps * kWarpBytes, kOutBytes);

  __device__ __forceinline__ DecodeTile(const Arguments& arguments, const Block& block,
                                        const KeyPages<kPaged>& pages, unsigned char* shared)
      : a_(arguments),
        p_(arguments.attention),
        b_(block),
        s_(block.sequence),
        row_begin_(block.row_begin),
        lane_(threadIdx.x % kWarpThreads),
        warp_(threadIdx.x / kWarpThreads),
        shared_(shared),
        mask_{s_.seqlen_q, s_.seqlen_k, a_.score.window_left, a_.score.window_right},
        part_(part_of(mask_.tiles(token(row_begin_), end_token(), kKeys))),
        whole_(mask_.full_tiles(token(row_begin_), end_token(), kKeys)),
        tiles_(a_, b_, pages, lane_, (part_.begin + warp_) * kKeys),
        query_reader_(query_reader<kHeadDim>(query_tile(), 0, lane_)),
        key_reader_(key_reader<kHeadDim>(key_tile(), lane_)),
        value_reader_(value_reader<kHeadDimV>(value_tile(), lane_)),
        softmax_(a_.score.floor) {
    clear(out_);
  }

  // The warp's share of the keys of the part.
  __device__ __forceinline__ void attend() {
    if (part_.begin >= part_.end) return;
    int32_t tile = part_.begin + warp_;
    tiles_.find(tile * kKeys);
    if (warp_ == 0) load_queries();
    ptx::cp_async_commit();
    load_keys(tile);
    ptx::cp_async_wait<1>();
    __syncthreads();
    for (; tile < part_.end; tile += kWarps) step(tile);
  }

  // The block's result: what its warps have, combined.
  __device__ __forceinline__ void write() {
    auto* row_max = reinterpret_cast<float*>(shared_);  // [warp][row], in place of the queries
    float* row_sum = row_max + kWarps * kRows;
    auto* warp_out = reinterpret_cast<float*>(shared_ + kQueryBytes);
    __syncthreads();
#pragma unroll
    for (int32_t h = 0; h < 2; ++h) {
      const int32_t at = warp_ * kRows + 8 * h + lane_ / 4;
      const float sum = quad_sum(softmax_.sum[0][h]);
      if (lane_ % 4 == 0) {
        row_max[at] = softmax_.max[0][h];
        row_sum[at] = sum;
      }
#pragma unroll
      for (int32_t n = 0; n < kHeadDimV / 8; ++n) {
        float* pair = warp_out + at * kOutPitch + 8 * n + lane_ % 4 * 2;
        pair[0] = out_[0][n][2 * h];
        pair[1] = out_[0][n][2 * h + 1];
      }
    }
    __syncthreads();
    write_row(row_max, row_sum, warp_out);
  }

 private:
  static constexpr int32_t kRowThreads = kThreads / kRows;  // finish a row together
  using Copy = TileCopy<kKeys, kHeadDim, kWarpThreads>;
  using CopyV = TileCopy<kKeys, kHeadDimV, kWarpThreads>;

  __device__ __forceinline__ int32_t token(int32_t row) const {
    return int32_t(a_.group.quotient(uint32_t(row)));
  }
  __device__ __forceinline__ int32_t head(int32_t row) const {
    return b_.first_head + row - token(row) * int32_t(a_.group.value);
  }
  __device__ __forceinline__ int32_t end_token() const {
    return smaller(token(row_begin_ + kRows - 1) + 1, s_.seqlen_q);
  }
  // Of the thread's scores.
  __device__ __forceinline__ int32_t row(int32_t h) const { return row_begin_ + 8 * h + lane_ / 4; }

  __device__ __forceinline__ uint32_t query_tile() const { return ptx::shared_address(shared_); }
  __device__ __forceinline__ uint32_t key_tile() const {
    return query_tile() + kQueryBytes + warp_ * kWarpBytes;
  }
  __device__ __forceinline__ uint32_t value_tile() const { return key_tile() + kKeyBytes; }

  // The key tiles of part `split`, in rounds of a tile for each warp.
  __device__ __forceinline__ TileRange<int32_t> part_of(const TileRange<int32_t>& tiles) const {
    const int32_t rounds = larger((tiles.end - tiles.begin + kWarps - 1) / kWarps, 0);
    const int32_t each = (rounds + a_.splits - 1) / a_.splits * kWarps;
    const int32_t begin = tiles.begin + b_.split * each;
    return {begin, smaller(begin + each, tiles.end)};
  }

  __device__ __forceinline__ void load_queries() {
    const TileCopy<kRows, kHeadDim, kWarpThreads> copy(lane_);
    GroupRows rows = copy.place(GroupRows(p_, p_.q, a_.group, s_, b_.first_head), row_begin_);
    copy.template load<false>(query_tile(), rows,
                              s_.seqlen_q * int32_t(a_.group.value) - row_begin_,
                              int32_t(p_.head_dim));
  }

  // Closes a group of copies whether or not there is a tile left to load.
  __device__ __forceinline__ void load_keys(int32_t tile) {
    if (tile < part_.end) {
      Copy(lane_).template load<false>(key_tile(), tiles_.keys(), s_.seqlen_k - tile * kKeys,
                                       int32_t(p_.head_dim));
    }
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void load_values(int32_t tile) {
    CopyV(lane_).template load<false>(value_tile(), tiles_.values(), s_.seqlen_k - tile * kKeys,
                                      int32_t(p_.head_dim_v));
    tiles_.next((tile + kWarps) * kKeys, 1);
    ptx::cp_async_commit();
  }

  // All keys of a tile. A lane waits for its own copies, the others see them behind __syncwarp,
  // which also keeps copies from overtaking the readers of the tile before.
  __device__ __forceinline__ void step(int32_t tile) {
    __syncwarp();
    load_values(tile);

    ptx::cp_async_wait<1>();
    __syncwarp();
    Accumulator<1, kKeys> scores;
    multiply_keys<T>(scores, query_reader_, key_reader_);
    __syncwarp();
    load_keys(tile + kWarps);

    const int32_t first_key = tile * kKeys + lane_ % 4 * 2;
    if constexpr (kExtras != Extras::none) modify(scores, first_key);
    if (tile < whole_.begin || tile >= whole_.end) hide(scores, first_key);
    softmax_.template update<false>(scores, out_, a_.score.exponent);

    ptx::cp_async_wait<1>();
    __syncwarp();
    multiply_values<T>(out_, scores, value_reader_);
  }

  __device__ __forceinline__ void hide(Accumulator<1, kKeys>& scores, int32_t first_key) {
    int32_t begin[2], end[2];
#pragma unroll
    for (int32_t h = 0; h < 2; ++h) {
      begin[h] = mask_.kv_begin(token(row(h)));
      end[h] = mask_.kv_end(token(row(h)));
    }
    hide_keys(scores, first_key,
              [&](int32_t h, int32_t key) { return begin[h] <= key && key < end[h]; });
  }

  __device__ __forceinline__ void modify(Accumulator<1, kKeys>& scores, int32_t first_key) {
    modify_scores<true>(scores, a_.score);
    if (!p_.alibi_slopes) return;
    const float* slopes = p_.alibi_slopes + s_.index * p_.alibi_batch_stride;
    float slope[2];
    int32_t diagonal[2];
#pragma unroll
    for (int32_t h = 0; h < 2; ++h) {
      slope[h] = token(row(h)) < s_.seqlen_q ? slopes[head(row(h))] * a_.score.inverse_unit : 0;
      diagonal[h] = token(row(h)) + mask_.shift();
    }
    add_alibi(scores, first_key, slope, diagonal, a_.score.alibi_by_key);
  }

  // Eight threads combine the warps' results for one row and write four columns at a time.
  __device__ __forceinline__ void write_row(const float* row_max, const float* row_sum,
                                            const float* warp_out) {
    const int32_t thread = int32_t(threadIdx.x);
    const int32_t r = thread / kRowThreads, part = thread % kRowThreads;
    const int32_t query = token(row_begin_ + r), query_head = head(row_begin_ + r);
    if (query >= s_.seqlen_q) return;

    float max = a_.score.floor;
#pragma unroll
    for (int32_t w = 0; w < kWarps; ++w) max = fmaxf(max, row_max[w * kRows + r]);
    float weight[kWarps];
    float sum = 0;
#pragma unroll
    for (int32_t w = 0; w < kWarps; ++w) {
      weight[w] = ptx::ex2((row_max[w * kRows + r] - max) * a_.score.exponent);
      sum += weight[w] * row_sum[w * kRows + r];
    }
    const bool last = !b_.in_parts(a_);
    const float sink = last && p_.sinks ? p_.sinks[query_head] : -infinity();
    const RowResult result = finish_row(logit(a_.score, max), sum, sink);
    const int64_t in_parts = part_row(p_, b_.split, s_.index, query_head, query);
    if (part == 0) {
      float* lse =
          last ? statistics_of(p_, p_.lse, s_, query_head) + query : a_.part_lse + in_parts;
      *lse = result.lse;
    }
    char* out =
        strided_rows(p_.out, p_.cu_seqlens_q != nullptr, s_.index, s_.first_q, query_head)[query];
#pragma unroll
    for (int32_t i = 0; i < kHeadDimV / (4 * kRowThreads); ++i) {
      const int32_t column = 4 * (part + i * kRowThreads);
      if (column >= p_.head_dim_v) break;
      float x[4] = {};
#pragma unroll
      for (int32_t w = 0; w < kWarps; ++w) {
#pragma unroll
        for (int32_t c = 0; c < 4; ++c) {
          x[c] += weight[w] * warp_out[(w * kRows + r) * kOutPitch + column + c];
        }
      }
#pragma unroll
      for (int32_t c = 0; c < 4; ++c) x[c] *= result.inverse_sum;
      if (last) {
        store_4(T{}, out + 2 * column, x);
      } else {
        float* words = a_.part_out + in_parts * p_.head_dim_v + column;
#pragma unroll
        for (int32_t c = 0; c < 4; ++c) words[c] = x[c];
      }
    }
  }

  const Arguments& a_;
  const AttentionParams& p_;
  const Block b_;
  const Sequence s_;
  const int32_t row_begin_;
  const int32_t lane_;
  const int32_t warp_;
  unsigned char* const shared_;
  const IntervalMask<int32_t> mask_;
  const TileRange<int32_t> part_;   // key tiles of the block
  const TileRange<int32_t> whole_;  // key tiles that every row of the block sees
  KeyTiles<kPaged, Copy, CopyV> tiles_;
  const TileReader<kHeadDim> query_reader_;
  const TileReader<kHeadDim> key_reader_;
  const TileReader<kHeadDimV> value_reader_;
  OnlineSoftmax<1> softmax_;
  Accumulator<1, kHeadDimV> out_;
};

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras, bool kPaged>
__global__ void __launch_bounds__(DecodeTile<T, kHeadDim, kHeadDimV, kExtras, kPaged>::kThreads)
    decode_kernel(const Arguments a) {
  using Tile = DecodeTile<T, kHeadDim, kHeadDimV, kExtras, kPaged>;
  extern __shared__ __align__(128) unsigned char shared[];
  const Block block = Block::of<Tile::kRows>(a);
  if (!block.has_rows(a)) return;
  KeyPages<kPaged> pages(a, block);
  pages.pin();
  Tile tile(a, block, pages, shared);
  tile.attend();
  tile.write();
}

}  // namespace anyflash::sm80
