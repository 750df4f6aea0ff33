// Attention backward, a block per tile of query rows: dq alone, for a gradient that is the same to
// the last bit each time. Where keys_kernel adds to what other blocks add to, this one makes scores
// and probabilities once more: seven products instead of five.
//
// A warp has 16-row tiles of its own, so that dS is its product's operand as it lies in registers.
// Keys have two buffers: one is read until the end of a step. On sm_75 they have one: the next keys
// and values come through registers and are stored between two barriers at the top of their step.
#pragma once

#include "kernels/sm80/backward_rows.cuh"
#include "kernels/sm80/gradients.cuh"

namespace anyflash::sm80 {

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras, int32_t kSharedKb>
class QueryTile {
 public:
  static constexpr QueryTileShape kShape = query_tile_shape(kHeadDim, kSharedKb);
  static constexpr int32_t kThreads = kShape.warps * kWarpThreads;

 private:
  static constexpr int32_t kWarpRows = kShape.rows / kShape.warps;
  static constexpr int32_t kMTiles = kWarpRows / 16, kNTiles = kShape.keys / 8;
  using QTile = SwizzledTile<kHeadDim>;
  using VTile = SwizzledTile<kHeadDimV>;
  static constexpr int32_t kKeyBuffers = kSharedKb < kLeastSharedKb ? 1 : 2;
  // Q that goes into registers passes through the place of dO.
  static constexpr int32_t kQ = 0;
  static constexpr int32_t kDout = kShape.q_in_registers ? kQ : kQ + QTile::bytes(kShape.rows);
  static constexpr int32_t kV = kDout + VTile::bytes(kShape.rows);
  static constexpr int32_t kK = kV + VTile::bytes(kShape.keys);

 public:
  static constexpr int32_t kSharedBytes = kK + kKeyBuffers * QTile::bytes(kShape.keys);
  static_assert(kQ + QTile::bytes(kShape.rows) <= kSharedBytes);
  static_assert(!kShape.q_in_registers || kHeadDim == kHeadDimV);

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
    if constexpr (kShape.q_in_registers) hold_queries();
    load(CopyV(thread_), kDout, queries(p_.dout), b_.row_begin, s_.seqlen_q, p_.head_dim_v);
    if constexpr (ptx::kHasCpAsync) {
      load_keys(some.end - 1);
      load_values(some.end - 1);
    } else {
      const int32_t first = (some.end - 1) * kShape.keys;
      next_keys_ = KeyCopy(thread_).place(keys(p_.k), first);
      next_values_ = ValueCopy(thread_).place(keys(p_.v), first);
      fetch<false>(s_.seqlen_k - first);
    }
    const auto q = query_reader<kHeadDim>(address(kQ), warp_row_, lane_);
    const auto dout = query_reader<kHeadDimV>(address(kDout), warp_row_, lane_);
    const auto values = key_reader<kHeadDimV>(address(kV), lane_);
    for (int32_t tile = some.end - 1; tile >= some.begin; --tile) {
      const uint32_t k = k_address(tile);
      Gradients<kExtras, kMTiles, kNTiles> gradients(a_, a_.rows + first + warp_row_ + lane_ / 4);
      await_keys_and_values(k);
      if (ptx::kHasCpAsync && tile > some.begin) load_keys(tile - 1);
      Accumulator<kMTiles, kShape.keys> scores, dp;
      multiply_queries(scores, q, key_reader<kHeadDim>(k, lane_));
      gradients.probabilities(
          scores, head,
          [&] {
            return Corner{b_.row_begin + warp_row_ + lane_ / 4, tile * kShape.keys + lane_ % 4 * 2};
          },
          [&] { return mask_; }, tile < whole.begin || tile >= whole.end,
          [](int32_t, int32_t, int32_t, float, float) {});
      multiply_keys<T>(dp, dout, values);
      if constexpr (ptx::kHasCpAsync) {
        __syncthreads();
        if (tile > some.begin) load_values(tile - 1);
      }
      gradients.scores(dp, scores, [](const auto&) {});
      if (!ptx::kHasCpAsync && tile > some.begin) fetch<true>();
      multiply_values<T>(dq_, dp, value_reader<kHeadDim>(k, lane_));
    }
  }

  __device__ __forceinline__ void write() const {
    const uint32_t slice = QTile::bytes(warp_row_);  // of Q or dO, which only this warp reads
    if constexpr (!ptx::kHasCpAsync) {               // there is no barrier behind its last reader
      __syncwarp();
    }
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
  using KeyCopy = CopyOf<kHeadDim, kShape.keys>;
  using ValueCopy = CopyOf<kHeadDimV, kShape.keys>;

  __device__ __forceinline__ uint32_t address(int32_t place) const {
    return ptx::shared_address(shared_) + place;
  }
  __device__ __forceinline__ uint32_t k_address(int32_t tile) const {
    return address(kK) + tile % kKeyBuffers * QTile::bytes(kShape.keys);
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
    load(KeyCopy(thread_), kK + tile % kKeyBuffers * QTile::bytes(kShape.keys), keys(p_.k),
         tile * kShape.keys, s_.seqlen_k, p_.head_dim);
  }
  __device__ __forceinline__ void load_values(int32_t tile) const {
    load(ValueCopy(thread_), kV, keys(p_.v), tile * kShape.keys, s_.seqlen_k, p_.head_dim_v);
  }
  // Without cp.async: keys and values of the tile before the one that was fetched last, which alone
  // may reach beyond the last key: of it num_rows are there. kWhole: all.
  template <bool kWhole>
  __device__ __forceinline__ void fetch(int32_t num_rows = 0) {
    KeyCopy(thread_).template fetch<kWhole>(fetched_keys_, next_keys_, num_rows,
                                            int32_t(p_.head_dim));
    ValueCopy(thread_).template fetch<kWhole>(fetched_values_, next_values_, num_rows,
                                              int32_t(p_.head_dim_v));
    next_keys_.skip(-a_.k_tile_bytes);
    next_values_.skip(-a_.v_tile_bytes);
  }
  // What was asked for is there for every thread.
  __device__ __forceinline__ void await_keys_and_values(uint32_t k) const {
    if constexpr (ptx::kHasCpAsync) {
      ptx::cp_async_wait<0>();
    } else {
      // Nobody reads those before.
      __syncthreads();
      KeyCopy(thread_).put(k, fetched_keys_);
      ValueCopy(thread_).put(address(kV), fetched_values_);
    }
    __syncthreads();
  }

  // The warp's rows of Q, as fragments of the scores' product.
  __device__ __forceinline__ void hold_queries() {
    ptx::cp_async_wait<0>();
    __syncthreads();
    const auto q = query_reader<kHeadDim>(address(kQ), warp_row_, lane_);
#pragma unroll
    for (int32_t k = 0; k < kHeadDim / 16; ++k) {
#pragma unroll
      for (int32_t m = 0; m < kMTiles; ++m) ptx::ldmatrix_x4(queries_[k][m], q.at(16 * m, k));
    }
    __syncthreads();
  }
  __device__ __forceinline__ void multiply_queries(float (&scores)[kMTiles][kNTiles][4],
                                                   const TileReader<kHeadDim>& q,
                                                   const TileReader<kHeadDim>& keys) const {
    if constexpr (kShape.q_in_registers) {
      clear(scores);
      multiply<T, kHeadDim / 16>(
          scores,
          [&](uint32_t (&f)[4], int32_t m, int32_t k) {
#pragma unroll
            for (int32_t i = 0; i < 4; ++i) f[i] = queries_[k][m][i];
          },
          [&](uint32_t (&f)[4], int32_t n, int32_t k) { ptx::ldmatrix_x4(f, keys.at(8 * n, k)); });
    } else {
      multiply_keys<T>(scores, q, keys);
    }
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
  StridedRows next_keys_{};  // without cp.async: of the next tile to fetch
  StridedRows next_values_{};
  typename KeyCopy::Fetched fetched_keys_;
  typename ValueCopy::Fetched fetched_values_;
  uint32_t queries_[kShape.q_in_registers ? kHeadDim / 16 : 1][kMTiles][4];
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
