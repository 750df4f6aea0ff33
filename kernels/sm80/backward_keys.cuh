// Attention backward, a block per tile of keys: dk and dv, which stay in registers, and dq, to
// whose sums all blocks of a row add. The method is FlashAttention-2's (Dao, arXiv:2307.08691).
//
// A block walks over the query tiles that see its keys, for each head of the group that shares
// them, from the last tile to the first. The five products of a step, and what keeps them apart:
//
//   S = Q K^T, dP = dO V^T   | barrier |   dV += P^T dO   | barrier |   dQ = dS K, dK += dS^T Q
//                              P and dS                     dO of the
//                              are there                    next step
//
// On sm_75 dQ is left to backward_queries.cuh. The next tile's rows come through registers, which
// are free behind the first barrier, and are stored between two barriers at the top of its step.
//
// Scores are rows of queries by columns of keys. P and dS go through shared memory, because each
// product needs them shared out differently.
#pragma once

#include "kernels/sm80/backward_rows.cuh"
#include "kernels/sm80/gradients.cuh"

namespace anyflash::sm80 {

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras, int32_t kSharedKb>
class KeyTile {
 public:
  static constexpr KeyTileShape kShape = key_tile_shape(kHeadDim, kSharedKb);
  static constexpr int32_t kRows = kShape.rows, kKeys = kShape.keys;
  static constexpr int32_t kThreads = kBackwardThreads;

 private:
  using Sums = QuerySums<kHeadDim, kSharedKb>;
  // Warps along the columns of scores, and of dk and dv.
  static constexpr int32_t kScoreColumnWarps = kBackwardWarps / kShape.score_warps;
  static constexpr int32_t kColumnWarps = kBackwardWarps / kShape.key_warps;
  static constexpr int32_t kScoreRows = kRows / kShape.score_warps;
  static constexpr int32_t kScoreKeys = kKeys / kScoreColumnWarps;
  static constexpr int32_t kWarpKeys = kKeys / kShape.key_warps;
  static constexpr int32_t kMTiles = kScoreRows / 16, kNTiles = kScoreKeys / 8;
  static constexpr bool kAddsQueries = kSharedKb >= kLeastSharedKb;

  using KTile = SwizzledTile<kHeadDim>;
  using VTile = SwizzledTile<kHeadDimV>;
  using ScoreTile = SwizzledTile<kKeys>;
  // Where tiles lie in shared memory. V that goes into registers passes through the place of what
  // comes next.
  static constexpr int32_t kK = 0;
  static constexpr int32_t kV = kK + KTile::bytes(kKeys);
  static constexpr int32_t kP = kShape.v_in_registers ? kV : kV + VTile::bytes(kKeys);
  static constexpr int32_t kDs = kP + ScoreTile::bytes(kRows);
  static constexpr int32_t kDout = kDs + ScoreTile::bytes(kRows);
  static constexpr int32_t kQ = kDout + VTile::bytes(kRows);

 public:
  // What a block's threads have in common. In shared memory, because all registers are for scores
  // and gradients. On sm_75 tiles fill that, so that each thread has it.
  struct Common {
    KeyBlock block;
    int32_t group;     // heads that share the keys
    HeadNumbers head;  // of the one at work
  };
  static constexpr int32_t kCommonBytes = kSharedKb < kLeastSharedKb ? 0 : 128;
  static_assert(kCommonBytes == 0 || sizeof(Common) <= kCommonBytes);
  static constexpr int32_t kSharedBytes =
      kCommonBytes + kQ + kShape.q_buffers * KTile::bytes(kRows);
  static_assert(kCommonBytes + kV + VTile::bytes(kKeys) <= kSharedBytes);

  __device__ __forceinline__ KeyTile(const BackwardArguments& a, Common& common,
                                     unsigned char* shared)
      : a_(a),
        p_(a.attention),
        c_(common),
        b_(common.block),
        s_(common.block.sequence),
        thread_(int32_t(threadIdx.x)),
        lane_(thread_ % kWarpThreads),
        warp_(thread_ / kWarpThreads),
        shared_(shared),
        some_(mask().transposed().tiles(b_.key_begin, b_.key_begin + kKeys, kRows)),
        whole_(mask().transposed().full_tiles(b_.key_begin, b_.key_begin + kKeys, kRows)),
        scores_q_(query_reader<kHeadDim>(address(0), score_row(), lane_)),
        scores_k_(key_reader_at<kHeadDim>(address(0))),
        put_{address(0) + ScoreTile::offset(score_row() + lane_ / 4, score_key() / 8) +
             lane_ % 4 * 4},
        transposed_(tile_reader<kKeys>(address(0), lane_ / 16 * 8 + lane_ % 8,
                                       key_row() / 8 + lane_ / 8 % 2)),
        columns_q_(tile_reader<kHeadDim>(address(0), lane_ % 16, 2 * key_column() + lane_ / 16)),
        scores_dout_(alike<kHeadDimV>(
            scores_q_, [&] { return query_reader<kHeadDimV>(address(0), score_row(), lane_); })),
        scores_v_(
            alike<kHeadDimV>(scores_k_, [&] { return key_reader_at<kHeadDimV>(address(0)); })),
        columns_dout_(alike<kHeadDimV>(columns_q_,
                                       [&] {
                                         return tile_reader<kHeadDimV>(
                                             address(0), lane_ % 16, 2 * key_column() + lane_ / 16);
                                       })),
        query_ds_(query_reader<kKeys>(address(0), query_row(), lane_)),
        query_k_(tile_reader<kHeadDim>(address(0), lane_ % 16, 2 * query_column() + lane_ / 16)) {
    if (b_.key_begin + kKeys > s_.seqlen_k) whole_ = {0, 0};  // there are keys to hide
    clear(dk_);
    clear(dv_);
  }

  __device__ __forceinline__ void attend() {
    if (some_.begin >= some_.end) return;
    load_keys(KCopy(thread_), kK, p_.k, p_.head_dim);
    load_keys(VCopy(thread_), kV, p_.v, p_.head_dim_v);
    if constexpr (kShape.v_in_registers) hold_values();
    for (int32_t i = 0; i < c_.group; ++i) {
      attend_head(b_.head_k * c_.group + i);
      // Nobody reads a tile any more.
      __syncthreads();
    }
  }

  __device__ __forceinline__ void write() {
    stage<T, kHeadDim, kColumnWarps>(dk_, float(p_.softmax_scale), address(kK), key_row(),
                                     key_column(), lane_);
    stage<T, kHeadDimV, kColumnWarps>(dv_, a_.score.keep_scale, address(kV), key_row(),
                                      key_column(), lane_);
    __syncthreads();
    const KCopy k_copy(thread_);
    const VCopy v_copy(thread_);
    const int32_t rows = s_.seqlen_k - b_.key_begin;
    k_copy.store(shared_ + kK, k_copy.place(keys(p_.dk), 0), rows, int32_t(p_.head_dim));
    v_copy.store(shared_ + kV, v_copy.place(keys(p_.dv), 0), rows, int32_t(p_.head_dim_v));
  }

 private:
  using KCopy = TileCopy<kKeys, kHeadDim, kBackwardThreads>;
  using VCopy = TileCopy<kKeys, kHeadDimV, kBackwardThreads>;
  using QCopy = TileCopy<kRows, kHeadDim, kBackwardThreads>;
  using DoutCopy = TileCopy<kRows, kHeadDimV, kBackwardThreads>;

  __device__ __forceinline__ IntervalMask<int32_t> mask() const {
    return {s_.seqlen_q, s_.seqlen_k, a_.score.window_left, a_.score.window_right};
  }

  __device__ __forceinline__ uint32_t address(int32_t place) const {
    return ptx::shared_address(shared_) + place;
  }

  // Where warps stand.
  __device__ __forceinline__ int32_t score_row() const {
    return warp_ % kShape.score_warps * kScoreRows;
  }
  __device__ __forceinline__ int32_t score_key() const {
    return warp_ / kShape.score_warps * kScoreKeys;
  }
  __device__ __forceinline__ int32_t key_row() const {
    return warp_ % kShape.key_warps * kWarpKeys;
  }
  __device__ __forceinline__ int32_t key_column() const { return warp_ / kShape.key_warps; }
  __device__ __forceinline__ int32_t query_row() const {
    return warp_ % kShape.query_warps * Sums::kWarpRows;
  }
  __device__ __forceinline__ int32_t query_column() const { return warp_ / kShape.query_warps; }

  // From the tile's first key on.
  __device__ __forceinline__ StridedRows keys(const Rows& rows) const {
    return strided_rows(rows, p_.cu_seqlens_k != nullptr, s_.index, s_.first_k + b_.key_begin,
                        b_.head_k);
  }
  __device__ __forceinline__ StridedRows queries(const Rows& rows, int32_t head) const {
    return strided_rows(rows, p_.cu_seqlens_q != nullptr, s_.index, s_.first_q, head);
  }

  // A lane's place in tiles of other rows: the same register where they are as long.
  template <int32_t kColumns, typename Make>
  __device__ __forceinline__ static TileReader<kColumns> alike(const TileReader<kHeadDim>& reader,
                                                               const Make& make) {
    if constexpr (kColumns == kHeadDim) {
      return reader;
    } else {
      return make();
    }
  }

  template <typename Copy>
  __device__ __forceinline__ void load_keys(const Copy& copy, int32_t place, const Rows& rows,
                                            int64_t columns) const {
    StridedRows from = copy.place(keys(rows), 0);
    copy.template load<false>(address(place), from, s_.seqlen_k - b_.key_begin, int32_t(columns));
  }
  // The tile before the one that was loaded last, which alone may reach beyond the last row: of it
  // num_rows are there. kWhole: all.
  template <bool kWhole>
  __device__ __forceinline__ void load_queries(int32_t num_rows = 0) {
    if constexpr (ptx::kHasCpAsync) {
      QCopy(thread_).template load<kWhole>(address(kQ) + q_buffer_, queries_, num_rows,
                                           int32_t(p_.head_dim));
    } else {
      QCopy(thread_).template fetch<kWhole>(fetched_q_, queries_, num_rows, int32_t(p_.head_dim));
    }
    queries_.skip(-a_.q_tile_bytes);
  }
  template <bool kWhole>
  __device__ __forceinline__ void load_dout(int32_t num_rows = 0) {
    if constexpr (ptx::kHasCpAsync) {
      DoutCopy(thread_).template load<kWhole>(address(kDout), douts_, num_rows,
                                              int32_t(p_.head_dim_v));
    } else {
      DoutCopy(thread_).template fetch<kWhole>(fetched_dout_, douts_, num_rows,
                                               int32_t(p_.head_dim_v));
    }
    douts_.skip(-a_.dout_tile_bytes);
  }
  // What was asked for is there for every thread.
  __device__ __forceinline__ void await_rows() const {
    if constexpr (ptx::kHasCpAsync) {
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
    } else {
      // Nobody reads the rows before.
      __syncthreads();
      QCopy(thread_).put(address(kQ), fetched_q_);
      DoutCopy(thread_).put(address(kDout), fetched_dout_);
    }
    __syncthreads();
  }

  // The warp's keys' rows of V, as fragments of dP's product.
  __device__ __forceinline__ void hold_values() {
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    const auto reader = key_reader_at<kHeadDimV>(address(kV));
#pragma unroll
    for (int32_t k = 0; k < kHeadDimV / 16; ++k) {
#pragma unroll
      for (int32_t n = 0; n < kNTiles; n += 2) {
        ptx::ldmatrix_x4(values_[k][n / 2], reader.at(8 * n, k));
      }
    }
    __syncthreads();
  }
  template <int32_t kColumns>
  __device__ __forceinline__ TileReader<kColumns> key_reader_at(uint32_t tile) const {
    return key_reader<kColumns>(tile + SwizzledTile<kColumns>::bytes(score_key()), lane_);
  }

  // All tiles of one head's rows.
  __device__ __forceinline__ void attend_head(int32_t head) {
    int32_t tile = some_.end - 1;
    const int32_t row = tile * kRows;
    const int64_t first = first_number(a_, s_, head) + row;
    // Seen behind the first barrier of a step.
    if (kCommonBytes == 0 || thread_ == 0) c_.head = HeadNumbers::of(p_, a_.score, s_.index, head);
    numbers_ = a_.rows + first + score_row() + lane_ / 4;
    if constexpr (kAddsQueries) sums_ = Sums::of(a_.dq_sums, first, thread_);
    queries_ = QCopy(thread_).place(queries(p_.q, head), row);
    douts_ = DoutCopy(thread_).place(queries(p_.dout, head), row);
    load_queries<false>(s_.seqlen_q - row);
    load_dout<false>(s_.seqlen_q - row);
    for (; tile > some_.begin; --tile) step<false>(tile);
    step<true>(tile);
  }

  template <bool kLast>
  __device__ __forceinline__ void step(int32_t tile) {
    Gradients<kExtras, kMTiles, kNTiles> gradients(a_, numbers_);
    const uint32_t q = kQ + q_buffer_;
    await_rows();
    if (kShape.q_buffers == 2 && !kLast) {
      q_buffer_ ^= KTile::bytes(kRows);
      load_queries<true>();
    }

    Accumulator<kMTiles, kScoreKeys> scores, dp;
    multiply_keys<T>(scores, TileReader<kHeadDim>{scores_q_.address + q}, scores_k_.in(kK));
    const auto corner = [&] {
      return Corner{tile * kRows + score_row() + lane_ / 4,
                    b_.key_begin + score_key() + lane_ % 4 * 2};
    };
    gradients.probabilities(
        scores, c_.head, corner, [&] { return mask(); }, tile < whole_.begin || tile >= whole_.end,
        [&](int32_t m, int32_t n, int32_t h, float x, float y) { put(kP, m, n, h, x, y); });
    const TileReader<kHeadDimV> dout = scores_dout_.in(kDout);
    if constexpr (kShape.v_in_registers) {
      clear(dp);
      multiply<T, kHeadDimV / 16>(
          dp,
          [&](uint32_t (&f)[4], int32_t m, int32_t k) { ptx::ldmatrix_x4(f, dout.at(16 * m, k)); },
          [&](uint32_t (&f)[4], int32_t n, int32_t k) {
#pragma unroll
            for (int32_t i = 0; i < 4; ++i) f[i] = values_[k][n / 2][i];
          });
    } else {
      multiply_keys<T>(dp, dout, scores_v_.in(kV));
    }
    gradients.scores(dp, scores, [&](const float (&logits)[kMTiles][kNTiles][4]) {
      if (p_.dbias) add_to_bias(logits, p_, s_, c_.head.dbias, corner());
    });
    for_pairs(dp, [&](int32_t m, int32_t n, int32_t h) {
      put(kDs, m, n, h, dp[m][n][2 * h], dp[m][n][2 * h + 1]);
    });

    __syncthreads();
    if (!ptx::kHasCpAsync && !kLast) {
      load_dout<true>();
      load_queries<true>();
    }
    add_transposed(dv_, transposed_.in(kP), columns_dout_.in(kDout));
    if (ptx::kHasCpAsync && !kLast) {
      __syncthreads();
      load_dout<true>();
    }
    if constexpr (kAddsQueries) {
      if (a_.dq_sums) add_queries();
    }
    add_transposed(dk_, transposed_.in(kDs), TileReader<kHeadDim>{columns_q_.address + q});
    if (ptx::kHasCpAsync && kShape.q_buffers == 1 && !kLast) {
      __syncthreads();
      load_queries<true>();
    }
    numbers_ -= kRows;
    if constexpr (kAddsQueries) sums_ -= kRows * kHeadDim;
  }

  // Two neighbours of a row of scores.
  __device__ __forceinline__ void put(int32_t place, int32_t m, int32_t n, int32_t h, float x,
                                      float y) const {
    ptx::store_shared_4(put_.in(place).at_chunk(16 * m + 8 * h, n), ptx::pack(T{}, x, y));
  }

  // out += scores^T rows
  template <int32_t kColumns, int32_t kOutM, int32_t kOutN>
  __device__ __forceinline__ void add_transposed(float (&out)[kOutM][kOutN][4],
                                                 const TileReader<kKeys>& scores,
                                                 const TileReader<kColumns>& rows) const {
    multiply<T, kRows / 16>(
        out,
        [&](uint32_t (&f)[4], int32_t m, int32_t k) {
          ptx::ldmatrix_x4_trans(f, scores.at(16 * k, m));
        },
        [&](uint32_t (&f)[4], int32_t n, int32_t k) {
          ptx::ldmatrix_x4_trans(f, rows.at(16 * k, n / 2 * kColumnWarps));
        });
  }

  // dQ of this tile, added to the sums of all key tiles.
  __device__ __forceinline__ void add_queries() const {
    typename Sums::Tile dq;
    clear(dq);
    multiply<T, kKeys / 16>(
        dq,
        [&](uint32_t (&f)[4], int32_t m, int32_t k) {
          ptx::ldmatrix_x4(f, query_ds_.in(kDs).at(16 * m, k));
        },
        [&](uint32_t (&f)[4], int32_t n, int32_t k) {
          ptx::ldmatrix_x4_trans(f, query_k_.in(kK).at(16 * k, n / 2 * Sums::kColumnWarps));
        });
#pragma unroll
    for (int32_t m = 0; m < Sums::kMTiles; ++m) {
#pragma unroll
      for (int32_t n = 0; n < Sums::kNTiles; ++n) {
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) ptx::add(sums_ + Sums::offset(m, n, i), dq[m][n][i]);
      }
    }
  }

  const BackwardArguments& a_;
  const AttentionParams& p_;
  Common& c_;
  const KeyBlock& b_;
  const Sequence& s_;
  const int32_t thread_;
  const int32_t lane_;
  const int32_t warp_;
  unsigned char* const shared_;
  const TileRange<int32_t> some_;  // query tiles in which some row sees one of the keys
  TileRange<int32_t> whole_;       // query tiles of which every row sees every key

  // Where the thread reads and writes: scores' operands, P and dS, the operands of dk and dv, of
  // dq. In a tile at the beginning of shared memory.
  const TileReader<kHeadDim> scores_q_;
  const TileReader<kHeadDim> scores_k_;
  const TileReader<kKeys> put_;
  const TileReader<kKeys> transposed_;
  const TileReader<kHeadDim> columns_q_;
  const TileReader<kHeadDimV> scores_dout_;
  const TileReader<kHeadDimV> scores_v_;
  const TileReader<kHeadDimV> columns_dout_;
  const TileReader<kKeys> query_ds_;
  const TileReader<kHeadDim> query_k_;

  const RowNumbers* numbers_;  // of the tile at work, from the thread's first row on
  float* sums_;                // of the same tile
  StridedRows queries_{};      // of the next tile to load
  StridedRows douts_{};
  typename QCopy::Fetched fetched_q_;  // without cp.async
  typename DoutCopy::Fetched fetched_dout_;
  uint32_t q_buffer_ = 0;  // behind kQ, where the ones loaded last are
  uint32_t values_[kShape.v_in_registers ? kHeadDimV / 16 : 1][kNTiles / 2][4];
  Accumulator<kWarpKeys / 16, kHeadDim / kColumnWarps> dk_;
  Accumulator<kWarpKeys / 16, kHeadDimV / kColumnWarps> dv_;
};

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras, int32_t kSharedKb>
__global__ void __launch_bounds__(kBackwardThreads) keys_kernel(const BackwardArguments a) {
  using Tile = KeyTile<T, kHeadDim, kHeadDimV, kExtras, kSharedKb>;
  if constexpr (kExtras == Extras::all || runs_here(key_tile_shape, kHeadDim, kSharedKb)) {
    extern __shared__ __align__(128) unsigned char shared[];
    using Common = typename Tile::Common;
    const KeyBlock block = KeyBlock::of<Tile::kKeys>(a);
    if (!block.has_keys()) return;
    const auto group = [&] { return int32_t(a.attention.heads) / int32_t(a.attention.heads_k); };
    if constexpr (Tile::kCommonBytes == 0) {
      Common common{block, group(), {}};
      Tile tile(a, common, shared);
      tile.attend();
      tile.write();
    } else {
      auto* common = reinterpret_cast<Common*>(shared);
      if (threadIdx.x == 0) {
        common->block = block;
        common->group = group();
      }
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
