// Tiles between global and shared memory in 16-byte chunks. Consecutive threads take consecutive
// chunks of a row, an atom (128 or 64 bytes) at a time: whole sectors of global memory, every bank
// of shared memory once. A thread's rows lie a power of two apart, so that it computes one address
// in the tile and the compiler knows the rest.
#pragma once

#include "kernels/common/ptx.cuh"
#include "kernels/common/swizzle.cuh"

namespace anyflash {

// kThreads share a tile of kRows x kColumns; `thread` counts from 0. Rows in global memory are
// those of sequence.cuh.
template <int32_t kRows, int32_t kColumns, int32_t kThreads>
class TileCopy {
  using Tile = SwizzledTile<kColumns>;
  static constexpr int32_t kRowStep = kThreads / Tile::kAtomChunks;
  static constexpr int32_t kAtomColumns = Tile::kAtomChunks * kChunkElements;
  static_assert((kRowStep & (kRowStep - 1)) == 0 && kRows % kRowStep == 0);

 public:
  __device__ __forceinline__ explicit TileCopy(int32_t thread)
      : row_(thread / Tile::kAtomChunks),
        chunk_(thread % Tile::kAtomChunks),
        offset_(Tile::offset(row_, chunk_)) {}

  // Queues rows first_row ... first_row + kRows - 1. Those from `num_rows` on and columns from
  // `num_columns` on become zeros and are not read; kWhole: all rows are there.
  template <bool kWhole, typename Source>
  __device__ __forceinline__ void load(uint32_t tile, const Source& source, int32_t first_row,
                                       int32_t num_rows, int32_t num_columns) const {
    auto rows = source.from(first_row + row_);
#pragma unroll
    for (int32_t i = 0; i < kRows / kRowStep; ++i, rows.skip(kRowStep)) {
      const bool exists = kWhole || first_row + row_ + i * kRowStep < num_rows;
      const char* chunk = rows.first() + chunk_ * kChunkBytes;
#pragma unroll
      for (int32_t atom = 0; atom < Tile::kAtoms; ++atom) {
        const bool wanted = exists && column(atom) < num_columns;
        ptx::cp_async_16(tile + offset(i) + atom * Tile::kAtomBytes,
                         chunk + atom * Tile::kAtomBytes, wanted ? kChunkBytes : 0);
      }
    }
  }

  // Writes the rows below `num_rows` and the columns below `num_columns` of a tile in shared
  // memory.
  template <typename Target>
  __device__ __forceinline__ void store(const unsigned char* tile, const Target& target,
                                        int32_t first_row, int32_t num_rows,
                                        int32_t num_columns) const {
    auto rows = target.from(first_row + row_);
#pragma unroll
    for (int32_t i = 0; i < kRows / kRowStep; ++i, rows.skip(kRowStep)) {
      if (first_row + row_ + i * kRowStep >= num_rows) continue;
      char* chunk = rows.first() + chunk_ * kChunkBytes;
#pragma unroll
      for (int32_t atom = 0; atom < Tile::kAtoms; ++atom) {
        if (column(atom) >= num_columns) continue;
        const auto* words = tile + offset(i) + atom * Tile::kAtomBytes;
        ptx::store_16(chunk + atom * Tile::kAtomBytes, *reinterpret_cast<const Words16*>(words));
      }
    }
  }

 private:
  __device__ __forceinline__ int32_t column(int32_t atom) const {
    return atom * kAtomColumns + chunk_ * kChunkElements;
  }

  // Rows a power of two apart: their phases differ in bits that the first row's does not have.
  __device__ __forceinline__ uint32_t offset(int32_t i) const {
    return (offset_ ^ Tile::phase(i * kRowStep) * kChunkBytes) + Tile::bytes(i * kRowStep);
  }

  int32_t row_;
  int32_t chunk_;
  uint32_t offset_;  // in the tile
};

}  // namespace anyflash
