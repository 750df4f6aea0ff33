// Attention backward, a block per tile of keys: dk and dv, which stay in registers, and dq, to whose
// sums all blocks of a row add. The method is FlashAttention-2's (Dao, arXiv:2307.08691).
//
// A block walks over the query tiles that see its keys, for each head of the group that shares them,
// from the last tile to the first. The five products of a step, and what keeps them apart:
//
//   S = Q K^T, dP = dO V^T   | barrier |   dV += P^T dO   | barrier |   dQ = dS K, dK += dS^T Q
//                              P and dS                     dO of the
//                              are there                    next step
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

 private:
  using Sums = QuerySums<kHeadDim, kSharedKb>;
  // Warps along the columns of scores, and of dk and dv.
  static constexpr int32_t kScoreColumnWarps = kBackwardWarps / kShape.score_warps;
  static constexpr int32_t kColumnWarps = kBackwardWarps / kShape.key_warps;
  static constexpr int32_t kScoreRows = kRows / kShape.score_warps;
  static constexpr int32_t kScoreKeys = kKeys / kScoreColumnWarps;
  static constexpr int32_t kWarpKeys = kKeys / kShape.key_warps;
  static constexpr int32_t kMTiles = kScoreRows / 16, kNTiles = kScoreKeys / 8;

  using KTile = SwizzledTile<kHeadDim>;
  using VTile = SwizzledTile<kHeadDimV>;
  using ScoreTile = SwizzledTile<kKeys>;
  // Where tiles lie in shared memory. V that goes into registers passes through dO's place.
  static constexpr int32_t kK = 0;
  static constexpr int32_t kDout = kK + KTile::bytes(kKeys);
  static constexpr int32_t kV = kShape.v_in_registers ? kDout : kDout + VTile::bytes(kRows);
  static constexpr int32_t kP = kShape.v_in_registers ? kDout + VTile::bytes(kRows)
                                                      : kV + VTile::bytes(kKeys);
  static constexpr int32_t kDs = kP + ScoreTile::bytes(kRows);
  static constexpr int32_t kQ = kDs + ScoreTile::bytes(kRows);

 public:
  static_assert(!kShape.v_in_registers || kRows >= kKeys, "V passes through dO's place");
  static constexpr int32_t kSharedBytes = kQ + kShape.q_buffers * KTile::bytes(kRows);

  __device__ __forceinline__ KeyTile(const BackwardArguments& a, const KeyBlock& block,
                                     unsigned char* shared)
      : a_(a),
        p_(a.attention),
        b_(block),
        s_(block.sequence),
        thread_(int32_t(threadIdx.x)),
        lane_(thread_ % kWarpThreads),
        warp_(thread_ / kWarpThreads),
        shared_(shared),
        mask_{s_.seqlen_q, s_.seqlen_k, a.score.window_left, a.score.window_right},
        some_(mask_.transposed().tiles(block.key_begin,
                                       smaller(block.key_begin + kKeys, s_.seqlen_k), kRows)),
        whole_(mask_.transposed().full_tiles(block.key_begin, block.key_begin + kKeys, kRows)) {
    if (block.key_begin + kKeys > s_.seqlen_k) whole_ = {0, 0};  // there are keys to hide
    clear(dk_);
    clear(dv_);
  }

  __device__ __forceinline__ void attend() {
    if (some_.begin >= some_.end) return;
    load(KCopy(thread_), kK, keys(p_.k), 0, s_.seqlen_k - b_.key_begin, p_.head_dim);
    load(VCopy(thread_), kV, keys(p_.v), 0, s_.seqlen_k - b_.key_begin, p_.head_dim_v);
    if constexpr (kShape.v_in_registers) hold_values();
    const int32_t group = int32_t(p_.heads / p_.heads_k);
    const int32_t tiles = some_.end - some_.begin, steps = tiles * group;
    Step now{b_.head_k * group, some_.end - 1};
    load_queries(now, 0);
    load_dout(now);
    for (int32_t step = 0; step < steps; ++step) {
      Step next{now.head, now.tile - 1};
      if (next.tile < some_.begin) next = {now.head + 1, some_.end - 1};
      work(now, next, step % kShape.q_buffers, step + 1 < steps);
      now = next;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void write() {
    const float dv_factor = drops(kExtras) ? a_.score.keep_scale : 1.0f;
    stage<T, kHeadDim, kColumnWarps>(dk_, float(p_.softmax_scale), address(kK), key_row(),
                                     key_column(), lane_);
    stage<T, kHeadDimV, kColumnWarps>(dv_, dv_factor, address(kV), key_row(), key_column(),
                                      lane_);
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

  struct Step {
    int32_t head;
    int32_t tile;  // of query rows
  };

  __device__ __forceinline__ uint32_t address(int32_t place) const {
    return ptx::shared_address(shared_) + place;
  }
  __device__ __forceinline__ uint32_t q_address(int32_t buffer) const {
    return address(kQ) + buffer * KTile::bytes(kRows);
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

  template <typename Copy>
  __device__ __forceinline__ void load(const Copy& copy, int32_t place, const StridedRows& rows,
                                       int32_t first_row, int32_t num_rows, int64_t columns) {
    StridedRows from = copy.place(rows, first_row);
    copy.template load<false>(address(place), from, num_rows, int32_t(columns));
  }
  __device__ __forceinline__ void load_queries(const Step& step, int32_t buffer) {
    const int32_t row = step.tile * kRows;
    load(QCopy(thread_), kQ + buffer * KTile::bytes(kRows), queries(p_.q, step.head), row,
         s_.seqlen_q - row, p_.head_dim);
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void load_dout(const Step& step) {
    const int32_t row = step.tile * kRows;
    load(DoutCopy(thread_), kDout, queries(p_.dout, step.head), row, s_.seqlen_q - row,
         p_.head_dim_v);
    ptx::cp_async_commit();
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

  __device__ __forceinline__ void work(const Step& now, const Step& next, int32_t buffer,
                                       bool more) {
    const HeadNumbers head = HeadNumbers::of(p_, a_.score, s_.index, now.head);
    const int64_t first = first_number(a_, s_, now.head) + now.tile * kRows;
    Gradients<kExtras, kMTiles, kNTiles> gradients(
        a_.score, p_, a_.rows + first + score_row() + lane_ / 4,
        now.tile * kRows + score_row() + lane_ / 4,
        b_.key_begin + score_key() + lane_ % 4 * 2);

    ptx::cp_async_wait<0>();
    __syncthreads();
    if (kShape.q_buffers == 2 && more) load_queries(next, 1 - buffer);

    Accumulator<kMTiles, kScoreKeys> scores;
    multiply_keys<T>(scores, query_reader<kHeadDim>(q_address(buffer), score_row(), lane_),
                     key_reader_at<kHeadDim>(address(kK)));
    gradients.probabilities(scores, head, mask_, now.tile < whole_.begin || now.tile >= whole_.end,
                            [&](int32_t m, int32_t n, int32_t h, float x, float y) {
                              put(kP, m, n, h, x, y);
                            });
    Accumulator<kMTiles, kScoreKeys> dp;
    const auto dout = query_reader<kHeadDimV>(address(kDout), score_row(), lane_);
    if constexpr (kShape.v_in_registers) {
      clear(dp);
      multiply<T, kHeadDimV / 16>(
          dp,
          [&](uint32_t(&f)[4], int32_t m, int32_t k) { ptx::ldmatrix_x4(f, dout.at(16 * m, k)); },
          [&](uint32_t(&f)[4], int32_t n, int32_t k) {
#pragma unroll
            for (int32_t i = 0; i < 4; ++i) f[i] = values_[k][n / 2][i];
          });
    } else {
      multiply_keys<T>(dp, dout, key_reader_at<kHeadDimV>(address(kV)));
    }
    gradients.scores(dp, scores);
#pragma unroll
    for (int32_t m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int32_t n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int32_t h = 0; h < 2; ++h) put(kDs, m, n, h, dp[m][n][2 * h], dp[m][n][2 * h + 1]);
      }
    }

    __syncthreads();
    add_transposed<kHeadDimV>(dv_, address(kP), address(kDout));
    __syncthreads();
    if (more) load_dout(next);
    if (a_.dq_sums) add_queries(first);
    add_transposed<kHeadDim>(dk_, address(kDs), q_address(buffer));
    if (kShape.q_buffers == 1) {
      __syncthreads();
      if (more) load_queries(next, 0);
    }
  }

  // Two neighbours of a row of scores.
  __device__ __forceinline__ void put(int32_t place, int32_t m, int32_t n, int32_t h, float x,
                                      float y) const {
    const TileReader<kKeys> at{address(place) +
                               ScoreTile::offset(score_row() + lane_ / 4, score_key() / 8) +
                               lane_ % 4 * 4};
    ptx::store_shared_4(at.at_chunk(16 * m + 8 * h, n), ptx::pack(T{}, x, y));
  }

  // out += scores^T rows
  template <int32_t kColumns, int32_t kOutM, int32_t kOutN>
  __device__ __forceinline__ void add_transposed(float (&out)[kOutM][kOutN][4], uint32_t scores,
                                                 uint32_t rows) const {
    const auto a =
        tile_reader<kKeys>(scores, lane_ / 16 * 8 + lane_ % 8, key_row() / 8 + lane_ / 8 % 2);
    const auto b = tile_reader<kColumns>(rows, lane_ % 16, 2 * key_column() + lane_ / 16);
    multiply<T, kRows / 16>(
        out,
        [&](uint32_t(&f)[4], int32_t m, int32_t k) {
          ptx::ldmatrix_x4_trans(f, a.at(16 * k, m));
        },
        [&](uint32_t(&f)[4], int32_t n, int32_t k) {
          ptx::ldmatrix_x4_trans(f, b.at(16 * k, n / 2 * kColumnWarps));
        });
  }

  // dQ of this tile, added to the sums of all key tiles.
  __device__ __forceinline__ void add_queries(int64_t first) const {
    typename Sums::Tile dq;
    clear(dq);
    const auto a = query_reader<kKeys>(address(kDs), query_row(), lane_);
    const auto b = tile_reader<kHeadDim>(address(kK), lane_ % 16, 2 * query_column() + lane_ / 16);
    multiply<T, kKeys / 16>(
        dq, [&](uint32_t(&f)[4], int32_t m, int32_t k) { ptx::ldmatrix_x4(f, a.at(16 * m, k)); },
        [&](uint32_t(&f)[4], int32_t n, int32_t k) {
          ptx::ldmatrix_x4_trans(f, b.at(16 * k, n / 2 * Sums::kColumnWarps));
        });
    float* sums = Sums::of(a_.dq_sums, first, thread_);
#pragma unroll
    for (int32_t m = 0; m < Sums::kMTiles; ++m) {
#pragma unroll
      for (int32_t n = 0; n < Sums::kNTiles; ++n) {
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) ptx::add(sums + Sums::offset(m, n, i), dq[m][n][i]);
      }
    }
  }

  const BackwardArguments& a_;
  const AttentionParams& p_;
  const KeyBlock& b_;
  const Sequence& s_;
  const int32_t thread_;
  const int32_t lane_;
  const int32_t warp_;
  unsigned char* const shared_;
  const IntervalMask<int32_t> mask_;
  const TileRange<int32_t> some_;  // query tiles in which some row sees one of the keys
  TileRange<int32_t> whole_;       // query tiles of which every row sees every key
  uint32_t values_[kShape.v_in_registers ? kHeadDimV / 16 : 1][kNTiles / 2][4];
  Accumulator<kWarpKeys / 16, kHeadDim / kColumnWarps> dk_;
  Accumulator<kWarpKeys / 16, kHeadDimV / kColumnWarps> dv_;
};

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras, int32_t kSharedKb>
__global__ void __launch_bounds__(kBackwardThreads) keys_kernel(const BackwardArguments a) {
  using Tile = KeyTile<T, kHeadDim, kHeadDimV, kExtras, kSharedKb>;
  if constexpr (kExtras == Extras::all || runs_here(key_tile_shape, kHeadDim, kSharedKb)) {
    extern __shared__ __align__(128) unsigned char shared[];
    const KeyBlock block = KeyBlock::of<Tile::kKeys>(a);
    if (!block.has_keys()) return;
    Tile tile(a, block, shared);
    tile.attend();
    tile.write();
  } else {
    ptx::trap();
  }
}

}  // namespace anyflash::sm80
