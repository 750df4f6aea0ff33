// The two matrix products of attention on the tensor cores, one warp's rows at a time.
//
// A warp's accumulators are kept as x[m][n][4]: 16-row tile m, 8-column tile n, and the four
// numbers of ptx::mma_m16n8k16: with g = lane / 4 and t = 2 (lane % 4), rows g (numbers 0, 1) and g
// + 8 (numbers 2, 3) at columns t and t + 1.
#pragma once

#include "kernels/common/ptx.cuh"
#include "kernels/common/swizzle.cuh"

namespace anyflash {

constexpr int32_t kWarpThreads = 32;

template <int32_t kMTiles, int32_t kColumns>
using Accumulator = float[kMTiles][kColumns / 8][4];

// function(m, n, i) for each number.
template <int32_t kMTiles, int32_t kNTiles, typename Function>
__device__ __forceinline__ void for_each(const float (&)[kMTiles][kNTiles][4],
                                         const Function& function) {
#pragma unroll
  for (int32_t m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int32_t n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) function(m, n, i);
    }
  }
}

template <int32_t kMTiles, int32_t kNTiles>
__device__ __forceinline__ void clear(float (&x)[kMTiles][kNTiles][4]) {
  for_each(x, [&](int32_t m, int32_t n, int32_t i) { x[m][n][i] = 0; });
}

// function(m, n, h) for each pair of neighbours in a row, x[m][n][2 h] and x[m][n][2 h + 1].
template <int32_t kMTiles, int32_t kNTiles, typename Function>
__device__ __forceinline__ void for_pairs(const float (&)[kMTiles][kNTiles][4],
                                          const Function& function) {
#pragma unroll
  for (int32_t m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int32_t n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int32_t h = 0; h < 2; ++h) function(m, n, h);
    }
  }
}

// Four neighbours of one row, rounded to T.
template <typename T>
__device__ __forceinline__ void store_4(T, void* global, const float (&x)[4]) {
  ptx::store_8(global, ptx::pack(T{}, x[0], x[1]), ptx::pack(T{}, x[2], x[3]));
}

template <int32_t kColumns>
__device__ __forceinline__ TileReader<kColumns> tile_reader(uint32_t tile, uint32_t row,
                                                            uint32_t half) {
  return {ptx::opaque(TileReader<kColumns>::address_of(tile, row, half))};
}

// The lanes of ldmatrix_x4 in the order that makes its registers a fragment of mma.
//
// a (rows of queries): matrices are rows 0-7 and 8-15 of the first half of the chunk pair, then of
// the second. The same order, transposed, gives two b fragments of rows of values: keys 0-7 and
// 8-15 of one 8-column tile, then of the next.
template <int32_t kColumns>
__device__ __forceinline__ TileReader<kColumns> query_reader(uint32_t tile, uint32_t row,
                                                             uint32_t lane) {
  return tile_reader<kColumns>(tile, row + lane % 16, lane / 16);
}
template <int32_t kColumns>
__device__ __forceinline__ TileReader<kColumns> value_reader(uint32_t tile, uint32_t lane) {
  return tile_reader<kColumns>(tile, lane % 16, lane / 16);
}

// b (rows of keys): both halves of the chunk pair for keys 0-7, then for keys 8-15.
template <int32_t kColumns>
__device__ __forceinline__ TileReader<kColumns> key_reader(uint32_t tile, uint32_t lane) {
  return tile_reader<kColumns>(tile, lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

// c += a b over a depth of 16 kSteps. load_a(fragment, m, k) fetches 16 rows of a at step k,
// load_b(fragment, n, k) the same step of the 8-column tiles n and n + 1 of b.
template <typename T, int32_t kSteps, int32_t kMTiles, int32_t kNTiles, typename LoadA,
          typename LoadB>
__device__ __forceinline__ void multiply(float (&c)[kMTiles][kNTiles][4], const LoadA& load_a,
                                         const LoadB& load_b) {
  static_assert(kNTiles % 2 == 0);
#pragma unroll
  for (int32_t k = 0; k < kSteps; ++k) {
    uint32_t a[kMTiles][4];
#pragma unroll
    for (int32_t m = 0; m < kMTiles; ++m) load_a(a[m], m, k);
#pragma unroll
    for (int32_t n = 0; n < kNTiles; n += 2) {
      uint32_t b[4];
      load_b(b, n, k);
#pragma unroll
      for (int32_t m = 0; m < kMTiles; ++m) {
        ptx::mma_m16n8k16(T{}, c[m][n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16(T{}, c[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// scores = queries * keys^T
template <typename T, int32_t kMTiles, int32_t kNTiles, int32_t kColumns>
__device__ __forceinline__ void multiply_keys(float (&scores)[kMTiles][kNTiles][4],
                                              const TileReader<kColumns>& queries,
                                              const TileReader<kColumns>& keys) {
  clear(scores);
  multiply<T, kColumns / 16>(
      scores,
      [&](uint32_t (&a)[4], int32_t m, int32_t k) { ptx::ldmatrix_x4(a, queries.at(16 * m, k)); },
      [&](uint32_t (&b)[4], int32_t n, int32_t k) { ptx::ldmatrix_x4(b, keys.at(8 * n, k)); });
}

// out += probabilities * values. Two neighbouring 8-column tiles of an accumulator, rounded to T,
// are an a fragment as they lie, so probabilities never leave the registers.
template <typename T, int32_t kMTiles, int32_t kNTiles, int32_t kOutTiles, int32_t kColumns>
__device__ __forceinline__ void multiply_values(float (&out)[kMTiles][kOutTiles][4],
                                                const float (&probabilities)[kMTiles][kNTiles][4],
                                                const TileReader<kColumns>& values) {
  multiply<T, kNTiles / 2>(
      out,
      [&](uint32_t (&a)[4], int32_t m, int32_t k) {
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
          const float (&tile)[4] = probabilities[m][2 * k + i / 2];
          a[i] = ptx::pack(T{}, tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
        }
      },
      [&](uint32_t (&b)[4], int32_t n, int32_t k) {
        ptx::ldmatrix_x4_trans(b, values.at(16 * k, n / 2));
      });
}

}  // namespace anyflash
