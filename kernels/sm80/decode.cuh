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
#include "kernels/common/sequence.cuh"
#include "kernels/common/tile_copy.cuh"
#include "kernels/sm80/arguments.h"
#include "kernels/sm80/split_plan.h"

namespace anyflash::sm80 {

// Where row r of the sequences' rows stands in part_out and part_lse.
__device__ __forceinline__ int64_t part_row(const AttentionParams& p, int32_t split,
                                            int32_t sequence, int32_t head, int32_t token) {
  return ((split * p.batch + sequence) * p.heads + head) * p.seqlen_q + token;
}

// Queries of one key head: row = token * group + head within the group.
struct GroupRows {
  const char* data;
  int64_t token_bytes;
  int64_t head_bytes;
  const Divisor& group;
  int32_t row;

  __device__ __forceinline__ GroupRows from(int32_t first) const {
    return {data, token_bytes, head_bytes, group, row + first};
  }
  __device__ __forceinline__ const char* first() const {
    const uint32_t token = group.quotient(row);
    return data + token * token_bytes + (row - token * group.value) * head_bytes;
  }
  __device__ __forceinline__ void skip(int32_t rows) { row += rows; }
};

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras>
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

  __device__ __forceinline__ DecodeTile(const DecodeArguments& arguments, const Sequence& sequence,
                                        int32_t head_k, int32_t row_begin, unsigned char* shared)
      : a_(arguments),
        p_(arguments.attention),
        s_(sequence),
        head_k_(head_k),
        row_begin_(row_begin),
        lane_(threadIdx.x % kWarpThreads),
        warp_(threadIdx.x / kWarpThreads),
        shared_(shared),
        mask_{s_.seqlen_q, s_.seqlen_k, a_.score.window_left, a_.score.window_right} {
    clear(out_);
  }

  // The warp's share of the keys of part `split`.
  __device__ __forceinline__ void attend(int32_t split) {
    const int32_t first_token = token(row_begin_);
    const int32_t end_token = smaller(token(row_begin_ + kRows - 1) + 1, s_.seqlen_q);
    const TileRange<int32_t> some = mask_.tiles(first_token, end_token, kKeys);
    whole_ = mask_.full_tiles(first_token, end_token, kKeys);
    const int32_t rounds = larger((some.end - some.begin + kWarps - 1) / kWarps, 0);
    const int32_t per_split = (rounds + a_.splits - 1) / a_.splits;
    int32_t tile = some.begin + split * per_split * kWarps;
    end_ = smaller(some.end, tile + per_split * kWarps);
    if (tile >= end_) return;

    tile += warp_;
    if (warp_ == 0) load_queries();
    ptx::cp_async_commit();
    load_keys(tile);
    ptx::cp_async_wait<1>();
    __syncthreads();
    for (; tile < end_; tile += kWarps) step(tile);
  }

  // The block's result: what its warps have, combined.
  __device__ __forceinline__ void write(int32_t split) {
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
    write_row(row_max, row_sum, warp_out, split);
  }

 private:
  static constexpr int32_t kRowThreads = kThreads / kRows;  // finish a row together

  __device__ __forceinline__ int32_t token(int32_t row) const {
    return int32_t(a_.group.quotient(uint32_t(row)));
  }
  __device__ __forceinline__ int32_t head(int32_t row) const {
    return head_k_ * int32_t(a_.group.value) + row - token(row) * int32_t(a_.group.value);
  }
  // Of the thread's scores.
  __device__ __forceinline__ int32_t row(int32_t h) const { return row_begin_ + 8 * h + lane_ / 4; }

  __device__ __forceinline__ uint32_t query_tile() const { return ptx::shared_address(shared_); }
  __device__ __forceinline__ uint32_t key_tile() const {
    return query_tile() + kQueryBytes + warp_ * kWarpBytes;
  }
  __device__ __forceinline__ uint32_t value_tile() const { return key_tile() + kKeyBytes; }

  __device__ __forceinline__ void load_queries() {
    const StridedRows rows =
        strided_rows(p_.q, p_.cu_seqlens_q != nullptr, s_.index, s_.first_q, head(0));
    const GroupRows group{rows.data, rows.row_bytes, 2 * p_.q.head_stride, a_.group, 0};
    TileCopy<kRows, kHeadDim, kWarpThreads>(lane_).template load<false>(
        query_tile(), group, row_begin_, s_.seqlen_q * int32_t(a_.group.value), p_.head_dim);
  }

  // Closes a group of copies whether or not there is a tile left to load.
  __device__ __forceinline__ void load_keys(int32_t tile) {
    if (tile < end_) load<kHeadDim>(key_tile(), p_.k, tile, p_.head_dim);
    ptx::cp_async_commit();
  }

  template <int32_t kColumns>
  __device__ __forceinline__ void load(uint32_t shared, const Rows& rows, int32_t tile,
                                       int64_t columns) {
    const TileCopy<kKeys, kColumns, kWarpThreads> copy(lane_);
    if (p_.block_table) {
      const KeyRows<true> paged(p_, rows, a_.page_size, s_, head_k_);
      copy.template load<false>(shared, paged, tile * kKeys, s_.seqlen_k, int32_t(columns));
    } else {
      const KeyRows<false> strided(p_, rows, a_.page_size, s_, head_k_);
      copy.template load<false>(shared, strided, tile * kKeys, s_.seqlen_k, int32_t(columns));
    }
  }

  // All keys of a tile. A lane waits for its own copies, the others see them behind __syncwarp,
  // which also keeps copies from overtaking the readers of the tile before.
  __device__ __forceinline__ void step(int32_t tile) {
    __syncwarp();
    load<kHeadDimV>(value_tile(), p_.v, tile, p_.head_dim_v);
    ptx::cp_async_commit();

    ptx::cp_async_wait<1>();
    __syncwarp();
    Accumulator<1, kKeys> scores;
    multiply_keys<T>(scores, query_reader<kHeadDim>(query_tile(), 0, lane_),
                     key_reader<kHeadDim>(key_tile(), lane_));
    __syncwarp();
    load_keys(tile + kWarps);

    const int32_t first_key = tile * kKeys + lane_ % 4 * 2;
    if constexpr (kExtras != Extras::none) modify(scores, first_key);
    if (tile < whole_.begin || tile >= whole_.end) hide(scores, first_key);
    softmax_.update(scores, out_, a_.score.exponent);

    ptx::cp_async_wait<1>();
    __syncwarp();
    multiply_values<T>(out_, scores, value_reader<kHeadDimV>(value_tile(), lane_));
  }

  __device__ __forceinline__ void hide(Accumulator<1, kKeys>& scores, int32_t first_key) {
    KeyInterval visible[2];
#pragma unroll
    for (int32_t h = 0; h < 2; ++h) {
      visible[h] = {mask_.kv_begin(token(row(h))), mask_.kv_end(token(row(h)))};
    }
    hide_keys(scores, first_key, visible);
  }

  __device__ __forceinline__ void modify(Accumulator<1, kKeys>& scores, int32_t first_key) {
    AlibiRow alibi[2];
#pragma unroll
    for (int32_t h = 0; h < 2; ++h) {
      float slope = 0;
      if (p_.alibi_slopes) slope = p_.alibi_slopes[s_.index * p_.alibi_batch_stride + head(row(h))];
      alibi[h] = {slope, token(row(h)) + mask_.shift()};
    }
    modify_scores(scores, first_key, alibi, a_.score);
  }

  // Eight threads combine the warps' results for one row and write four columns at a time.
  __device__ __forceinline__ void write_row(const float* row_max, const float* row_sum,
                                            const float* warp_out, int32_t split) {
    const int32_t thread = int32_t(threadIdx.x);
    const int32_t r = thread / kRowThreads, part = thread % kRowThreads;
    const int32_t query = token(row_begin_ + r), query_head = head(row_begin_ + r);
    if (query >= s_.seqlen_q) return;

    float max = -infinity();
#pragma unroll
    for (int32_t w = 0; w < kWarps; ++w) max = fmaxf(max, row_max[w * kRows + r]);
    float weight[kWarps];
    float sum = 0;
#pragma unroll
    for (int32_t w = 0; w < kWarps; ++w) {
      weight[w] = ptx::ex2((row_max[w * kRows + r] - finite_max(max)) * a_.score.exponent);
      sum += weight[w] * row_sum[w * kRows + r];
    }
    const bool last = a_.splits == 1;
    const float sink = last && p_.sinks ? p_.sinks[query_head] : -infinity();
    const RowResult result = finish_row(max * a_.score.logit, sum, sink);
    const int64_t in_parts = part_row(p_, split, s_.index, query_head, query);
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

  const DecodeArguments& a_;
  const AttentionParams& p_;
  const Sequence s_;
  const int32_t head_k_;
  const int32_t row_begin_;
  const int32_t lane_;
  const int32_t warp_;
  unsigned char* const shared_;
  const IntervalMask<int32_t> mask_;
  TileRange<int32_t> whole_{0, 0};  // key tiles that every row of the block sees
  int32_t end_ = 0;                 // of the part's key tiles
  Accumulator<1, kHeadDimV> out_;
  OnlineSoftmax<1> softmax_;
};

// Grid: splits x row tiles x key heads x sequences, in one dimension.
template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras>
__global__ void __launch_bounds__(DecodeTile<T, kHeadDim, kHeadDimV, kExtras>::kThreads)
    decode_kernel(const DecodeArguments a) {
  using Tile = DecodeTile<T, kHeadDim, kHeadDimV, kExtras>;
  extern __shared__ __align__(128) unsigned char shared[];
  const int32_t heads_k = int32_t(a.attention.heads_k);
  const int32_t block = int32_t(blockIdx.x);
  const int32_t split = block % a.splits;
  const int32_t row_tile = block / a.splits % a.row_tiles;
  const int32_t sequence_and_head = block / a.splits / a.row_tiles;
  const Sequence s = sequence_of(a.attention, sequence_and_head / heads_k);
  const int32_t row_begin = row_tile * Tile::kRows;
  if (row_begin >= s.seqlen_q * int32_t(a.group.value)) return;
  Tile tile(a, s, sequence_and_head % heads_k, row_begin, shared);
  tile.attend(split);
  tile.write(split);
}

// A warp combines the parts of one row: each lane weighs up to four of them, then all lanes go
// through the parts together, four columns a lane. Parts without keys are not read.
constexpr int32_t kCombineWarps = 4;

template <typename T>
__global__ void __launch_bounds__(kCombineWarps* kWarpThreads)
    combine_kernel(const DecodeArguments a) {
  const AttentionParams& p = a.attention;
  const int32_t lane = int32_t(threadIdx.x) % kWarpThreads;
  const int64_t row = int64_t(blockIdx.x) * kCombineWarps + threadIdx.x / kWarpThreads;
  const int64_t rows = p.batch * p.heads * p.seqlen_q;
  if (row >= rows) return;
  const int32_t token = int32_t(row % p.seqlen_q);
  const int32_t head = int32_t(row / p.seqlen_q % p.heads);
  const Sequence s = sequence_of(p, int32_t(row / p.seqlen_q / p.heads));
  if (token >= s.seqlen_q) return;

  constexpr int32_t kLaneParts = int32_t(kMostSplits) / kWarpThreads;
  float part_sum[kLaneParts];  // its logarithm
  float max = -infinity();
#pragma unroll
  for (int32_t i = 0; i < kLaneParts; ++i) {
    const int32_t part = i * kWarpThreads + lane;
    const float lse = part < a.splits ? a.part_lse[part * rows + row] : infinity();
    part_sum[i] = lse == infinity() ? -infinity() : lse;
    max = fmaxf(max, part_sum[i]);
  }
  max = warp_max(max);
  float sum = 0;
#pragma unroll
  for (int32_t i = 0; i < kLaneParts; ++i) {
    part_sum[i] = ptx::ex2((part_sum[i] - finite_max(max)) * kLog2e);  // from here on the weight
    sum += part_sum[i];
  }
  const float sink = p.sinks ? p.sinks[head] : -infinity();
  const RowResult result = finish_row(max, warp_sum(sum), sink);
  if (lane == 0) statistics_of(p, p.lse, s, head)[token] = result.lse;

  char* out = strided_rows(p.out, p.cu_seqlens_q != nullptr, s.index, s.first_q, head)[token];
  for (int32_t begin = 0; begin < p.head_dim_v; begin += 4 * kWarpThreads) {
    const int32_t column = begin + 4 * lane;
    float x[4] = {};
#pragma unroll
    for (int32_t i = 0; i < kLaneParts; ++i) {
      for (int32_t from = 0; from < kWarpThreads && i * kWarpThreads + from < a.splits; ++from) {
        const float weight = ptx::shuffle(part_sum[i], from);
        if (weight == 0 || column >= p.head_dim_v) continue;
        const float* part =
            a.part_out + ((i * kWarpThreads + from) * rows + row) * p.head_dim_v + column;
#pragma unroll
        for (int32_t c = 0; c < 4; ++c) x[c] += weight * part[c];
      }
    }
#pragma unroll
    for (int32_t c = 0; c < 4; ++c) x[c] *= result.inverse_sum;
    if (column < p.head_dim_v) store_4(T{}, out + 2 * column, x);
  }
}

}  // namespace anyflash::sm80
