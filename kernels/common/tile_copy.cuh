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

 public:
  static constexpr int32_t kRowThreads = Tile::kAtomChunks;    // neighbours that share their rows
  static constexpr int32_t kRowStep = kThreads / kRowThreads;  // between the rows of a thread
  static constexpr int32_t kRowsEach = kRows / kRowStep;

 private:
  static constexpr int32_t kAtomColumns = Tile::kAtomChunks * kChunkElements;
  static_assert((kRowStep & (kRowStep - 1)) == 0 && kRows % kRowStep == 0);

 public:
  __device__ __forceinline__ explicit TileCopy(uint32_t thread)
      : row_(int32_t(thread / kRowThreads)),
        chunk_(int32_t(thread % kRowThreads)),
        offset_(Tile::offset(row_, chunk_)) {}

  // The thread's place in a tile that begins at `first_row`, for load() and store().
  template <typename Rows>
  __device__ __forceinline__ auto place(const Rows& rows, int32_t first_row) const {
    return rows.from(first_row + row_, byte());
  }

  // Where the threads that share rows split work on them: the thread's first row. Its next one is
  // kRowThreads * kRowStep rows on.
  __device__ __forceinline__ int32_t own_row() const { return row_ + chunk_ * kRowStep; }

  // Of the thread's first chunk in its rows.
  __device__ __forceinline__ int32_t byte() const { return chunk_ * kChunkBytes; }

  // Queues the rows of a tile; without cp.async they are stored there and then. Those from
  // `num_rows` on and columns from `num_columns` on become zeros and are not read; kWhole: all rows
  // are there.
  template <bool kWhole, typename Place>
  __device__ __forceinline__ void load(uint32_t tile, Place&& place, int32_t num_rows,
                                       int32_t num_columns) const {
    if constexpr (!ptx::kHasCpAsync) {
      Fetched fetched;
      fetch<kWhole>(fetched, place, num_rows, num_columns);
      put(tile, fetched);
      return;
    }
    const int32_t columns = num_columns - chunk_ * kChunkElements;  // from the thread's on
#pragma unroll
    for (int32_t i = 0; i < kRowsEach; ++i) {
      const bool exists = kWhole || row_ + i * kRowStep < num_rows;
      if (i == 0) place.pin();
      const char* chunk = i == 0 ? place.chunk(0) : ptx::opaque(place.chunk(i * kRowStep));
#pragma unroll
      for (int32_t atom = 0; atom < Tile::kAtoms; ++atom) {
        const bool wanted = exists && atom * kAtomColumns < columns;
        ptx::cp_async_16(tile + offset(i) + atom * Tile::kAtomBytes,
                         chunk + atom * Tile::kAtomBytes, wanted);
      }
    }
  }

  // What a thread holds of a tile.
  struct Fetched {
    Words16 chunks[kRowsEach][Tile::kAtoms];
  };

  // The same in two steps, for GPUs without cp.async: into registers, and from there into the tile.
  template <bool kWhole, typename Place>
  __device__ __forceinline__ void fetch(Fetched& fetched, Place&& place, int32_t num_rows,
                                        int32_t num_columns) const {
    const int32_t columns = num_columns - chunk_ * kChunkElements;
#pragma unroll
    for (int32_t i = 0; i < kRowsEach; ++i) {
      const bool exists = kWhole || row_ + i * kRowStep < num_rows;
      if (i == 0) place.pin();
      const char* chunk = i == 0 ? place.chunk(0) : ptx::opaque(place.chunk(i * kRowStep));
#pragma unroll
      for (int32_t atom = 0; atom < Tile::kAtoms; ++atom) {
        Words16& words = fetched.chunks[i][atom];
        words = {};
        if (exists && atom * kAtomColumns < columns) {
          words = ptx::load_16(chunk + atom * Tile::kAtomBytes);
        }
      }
    }
  }
  __device__ __forceinline__ void put(uint32_t tile, const Fetched& fetched) const {
#pragma unroll
    for (int32_t i = 0; i < kRowsEach; ++i) {
#pragma unroll
      for (int32_t atom = 0; atom < Tile::kAtoms; ++atom) {
        ptx::store_shared_16(tile + offset(i) + atom * Tile::kAtomBytes, fetched.chunks[i][atom]);
      }
    }
  }

  // Writes the rows below `num_rows` and the columns below `num_columns` of a tile in shared
  // memory.
  template <typename Place>
  __device__ __forceinline__ void store(const unsigned char* tile, const Place& place,
                                        int32_t num_rows, int32_t num_columns) const {
    const int32_t columns = num_columns - chunk_ * kChunkElements;
#pragma unroll
    for (int32_t i = 0; i < kRowsEach; ++i) {
      if (row_ + i * kRowStep >= num_rows) continue;
      char* chunk = place.chunk(i * kRowStep);
#pragma unroll
      for (int32_t atom = 0; atom < Tile::kAtoms; ++atom) {
        if (atom * kAtomColumns >= columns) continue;
        const auto* words = tile + offset(i) + atom * Tile::kAtomBytes;
        ptx::store_16(chunk + atom * Tile::kAtomBytes, *reinterpret_cast<const Words16*>(words));
      }
    }
  }

 private:
  // Rows a power of two apart: their phases differ in bits that the first row's does not have.
  __device__ __forceinline__ uint32_t offset(int32_t i) const {
    return (offset_ ^ Tile::phase(i * kRowStep) * kChunkBytes) + Tile::bytes(i * kRowStep);
  }

  int32_t row_;
  int32_t chunk_;
  uint32_t offset_;  // in the tile
};

// A tile on its way into shared memory, where the other threads see it behind finish() and a
// barrier. Between start() and finish() nobody may read the tile.
template <typename Copy, bool kAsync = ptx::kHasCpAsync>
class TileOnItsWay {
 public:
  template <bool kWhole, typename Place>
  __device__ __forceinline__ void start(const Copy& copy, uint32_t tile, Place&& place,
                                        int32_t num_rows, int32_t num_columns) {
    copy.template load<kWhole>(tile, place, num_rows, num_columns);
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void finish(const Copy&, uint32_t) const { ptx::cp_async_wait<0>(); }
};

// Through registers.
template <typename Copy>
class TileOnItsWay<Copy, false> {
 public:
  template <bool kWhole, typename Place>
  __device__ __forceinline__ void start(const Copy& copy, uint32_t, Place&& place, int32_t num_rows,
                                        int32_t num_columns) {
    copy.template fetch<kWhole>(fetched_, place, num_rows, num_columns);
  }
  __device__ __forceinline__ void finish(const Copy& copy, uint32_t tile) const {
    copy.put(tile, fetched_);
  }

 private:
  typename Copy::Fetched fetched_;
};

}  // namespace anyflash
