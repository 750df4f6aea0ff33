// Attention backward, a block per tile of query rows: dq alone, for a gradient that is the same to
// the last bit each time. Where keys_kernel adds to what other blocks add to, this one makes scores
// and probabilities once more: seven products instead of five.
//
// A warp has 16-row tiles of its own, so that dS is its product's operand as it lies in registers.
// Keys have two buffers: one is read until the end of a step.
#pragma once

#include "kernels/sm80/backward_rows.cuh"
#include "kernels/sm80/gradients.cuh"

namespace anyflash::sm80 {

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras, int32_t kSharedKb>
class QueryTile {
 public:
  static constexpr TileShape kShape = query_tile_shape(kHeadDim, kSharedKb);
  static constexpr int32_t kThreads = kShape.warps * kWarpThreads;

 private:
  static constexpr int32_t kWarpRows = kShape.rows / kShape.warps;
  static constexpr int32_t kMTiles = kWarpRows / 16, kNTiles = kShape.keys / 8;
  using QTile = SwizzledTile<kHeadDim>;
  using VTile = SwizzledTile<kHeadDimV>;
  static constexpr int32_t kQ = 0;
  static constexpr int32_t kDout = kQ + QTile::bytes(kShape.rows);
  static constexpr int32_t kV = kDout + VTile::bytes(kShape.rows);
  static constexpr int32_t kK = kV + VTile::bytes(kShape.keys);

 public:
  static constexpr int32_t kSharedBytes = kK + 2 * QTile::bytes(kShape.keys);

  __device__ __forceinline__ QueryTile(const BackwardArguments& a, const Block& block,
                                       unsigned char* shared)
      : a_(a),
        p_(a.attention),
        b_(block),
        s_(block.sequence),
        thread_(int32_t(threadIdx.x)),
        lane_(thread_ % kWarpThreads),
        warp_row_(thread_ / kWarpThreads * kWarpRows),
        shared_(shared),
        mask_{s_.seqlen_q, s_.seqlen_k, a.score.window_left, a.score.window_right} {
    clear(dq_);
  }

  __device__ __forceinline__ void attend() {
    const int32_t end_row = smaller(b_.row_begin + kShape.rows, s_.seqlen_q);
    const TileRange<int32_t> some = mask_.tiles(b_.row_begin, end_row, kShape.keys);
    if (some.begin >= some.end) return;
    const TileRange<int32_t> whole = mask_.full_tiles(b_.row_begin, end_row, kShape.keys);
    const HeadNumbers head = HeadNumbers::of(p_, a_.score, s_.index, b_.first_head);
    const int64_t first = first_number(a_, s_, b_.first_head) + b_.row_begin;
    load(Copy(thread_), kQ, queries(p_.q), b_.row_begin, s_.seqlen_q, p_.head_dim);
    load(CopyV(thread_), kDout, queries(p_.dout), b_.row_begin, s_.seqlen_q, p_.head_dim_v);
    load_keys(some.end - 1);
    load_values(some.end - 1);
    const auto q = query_reader<kHeadDim>(address(kQ), warp_row_, lane_);
    const auto dout = query_reader<kHeadDimV>(address(kDout), warp_row_, lane_);
    const auto values = key_reader<kHeadDimV>(address(kV), lane_);
    for (int32_t tile = some.end - 1; tile >= some.begin; --tile) {
      const uint32_t k = k_address(tile);
      Gradients<kExtras, kMTiles, kNTiles> gradients(a_.score, p_,
                                                     a_.rows + first + warp_row_ + lane_ / 4);
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (tile > some.begin) load_keys(tile - 1);
      Accumulator<kMTiles, kShape.keys> scores, dp;
      multiply_keys<T>(scores, q, key_reader<kHeadDim>(k, lane_));
      gradients.probabilities(
          scores, head,
          [&] {
            return Corner{b_.row_begin + warp_row_ + lane_ / 4, tile * kShape.keys + lane_ % 4 * 2};
          },
          [&] { return mask_; }, tile < whole.begin || tile >= whole.end,
          [](int32_t, int32_t, int32_t, float, float) {});
      multiply_keys<T>(dp, dout, values);
      __syncthreads();
      if (tile > some.begin) load_values(tile - 1);
      gradients.scores(dp, scores);
      multiply_values<T>(dq_, dp, value_reader<kHeadDim>(k, lane_));
    }
  }

  __device__ __forceinline__ void write() const {
    const uint32_t slice = QTile::bytes(warp_row_);  // of Q, which only this warp reads
    stage<T, kHeadDim, 1>(dq_, float(p_.softmax_scale), address(kQ) + slice, 0, 0, lane_);
    __syncwarp();
    const TileCopy<kWarpRows, kHeadDim, kWarpThreads> copy(lane_);
    const int32_t row = b_.row_begin + warp_row_;
    copy.store(shared_ + slice, copy.place(queries(p_.dq), row), s_.seqlen_q - row,
               int32_t(p_.head_dim));
  }

 private:
  template <int32_t kColumns, int32_t kRows>
  using CopyOf = TileCopy<kRows, kColumns, kThreads>;
  using Copy = CopyOf<kHeadDim, kShape.rows>;
  using CopyV = CopyOf<kHeadDimV, kShape.rows>;

  __device__ __forceinline__ uint32_t address(int32_t place) const {
    return ptx::shared_address(shared_) + place;
  }
  __device__ __forceinline__ uint32_t k_address(int32_t tile) const {
    return address(kK) + tile % 2 * QTile::bytes(kShape.keys);
  }
  __device__ __forceinline__ StridedRows queries(const Rows& rows) const {
    return strided_rows(rows, p_.cu_seqlens_q != nullptr, s_.index, s_.first_q, b_.first_head);
  }
  __device__ __forceinline__ StridedRows keys(const Rows& rows) const {
    return strided_rows(rows, p_.cu_seqlens_k != nullptr, s_.index, s_.first_k,
                        b_.first_head / (int32_t(p_.heads) / int32_t(p_.heads_k)));
  }

  template <typename Copy>
  __device__ __forceinline__ void load(const Copy& copy, int32_t place, const StridedRows& rows,
                                       int32_t first_row, int32_t end, int64_t columns) const {
    StridedRows from = copy.place(rows, first_row);
    copy.template load<false>(address(place), from, end - first_row, int32_t(columns));
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void load_keys(int32_t tile) const {
    load(CopyOf<kHeadDim, kShape.keys>(thread_), kK + tile % 2 * QTile::bytes(kShape.keys),
         keys(p_.k), tile * kShape.keys, s_.seqlen_k, p_.head_dim);
  }
  __device__ __forceinline__ void load_values(int32_t tile) const {
    load(CopyOf<kHeadDimV, kShape.keys>(thread_), kV, keys(p_.v), tile * kShape.keys, s_.seqlen_k,
         p_.head_dim_v);
  }

  const BackwardArguments& a_;
  const AttentionParams& p_;
  const Block& b_;
  const Sequence& s_;
  const int32_t thread_;
  const int32_t lane_;
  const int32_t warp_row_;
  unsigned char* const shared_;
  const IntervalMask<int32_t> mask_;
  Accumulator<kMTiles, kHeadDim> dq_;
};

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras, int32_t kSharedKb>
__global__ void __launch_bounds__(QueryTile<T, kHeadDim, kHeadDimV, kExtras, kSharedKb>::kThreads)
    queries_kernel(const BackwardArguments a) {
  using Tile = QueryTile<T, kHeadDim, kHeadDimV, kExtras, kSharedKb>;
  extern __shared__ __align__(128) unsigned char shared[];
  const Block block = Block::of<Tile::kShape.rows>(a);
  if (!block.has_rows(a)) return;
  Tile tile(a, block, shared);
  tile.attend();
  tile.write();
}

}  // namespace anyflash::sm80
