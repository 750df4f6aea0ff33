// What the parts of a row's keys come to, for kernels whose keys were cut into parts.
#pragma once

#include "kernels/common/mma_tile.cuh"
#include "kernels/common/sequence.cuh"
#include "kernels/sm80/arguments.h"
#include "kernels/sm80/plan.h"

namespace anyflash::sm80 {

// Where row r of the sequences' rows stands in part_out and part_sums.
__device__ __forceinline__ int64_t part_row(const AttentionParams& p, int32_t split,
                                            int32_t sequence, int32_t head, int32_t token) {
  return ((split * p.batch + sequence) * p.heads + head) * p.seqlen_q + token;
}

// A warp combines the parts of one row: each lane weighs up to four of them, then all lanes go
// through the parts together, four columns a lane. Parts without keys are not read.
constexpr int32_t kCombineWarps = 4;

// kLeastSm: GPUs from which on it is compiled, so that code for others does not go by the same
// name.
template <typename T, int32_t kLeastSm = 80>
__global__ void __launch_bounds__(kCombineWarps* kWarpThreads) combine_kernel(const Arguments a) {
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
  PartSum parts[kLaneParts];
  float max = a.score.floor;
#pragma unroll
  for (int32_t i = 0; i < kLaneParts; ++i) {
    const int32_t part = i * kWarpThreads + lane;
    parts[i] = part < a.splits ? a.part_sums[part * rows + row] : PartSum{a.score.floor, 0};
    max = fmaxf(max, parts[i].max);
  }
  max = warp_max(max);
  float weights[kLaneParts];
  float sum = 0;
#pragma unroll
  for (int32_t i = 0; i < kLaneParts; ++i) {
    weights[i] = ptx::ex2((parts[i].max - max) * a.score.exponent) * parts[i].sum;
    sum += weights[i];
  }
  const float sink = p.sinks ? p.sinks[head] : -infinity();
  const RowResult result = finish_row(logit(a.score, max), warp_sum(sum), sink);
  if (lane == 0) statistics_of(p, p.lse, s, head)[token] = result.lse;

  char* out = strided_rows(p.out, p.cu_seqlens_q != nullptr, s.index, s.first_q, head)[token];
  for (int32_t begin = 0; begin < p.head_dim_v; begin += 4 * kWarpThreads) {
    const int32_t column = begin + 4 * lane;
    float x[4] = {};
#pragma unroll
    for (int32_t i = 0; i < kLaneParts; ++i) {
      for (int32_t from = 0; from < kWarpThreads && i * kWarpThreads + from < a.splits; ++from) {
        const float weight = ptx::shuffle(weights[i], from);
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
