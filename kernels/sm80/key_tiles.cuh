// Keys and values of a block, a tile at a time, as the threads of a TileCopy fetch them. Keys count
// from the first visible one on.
#pragma once

#include "kernels/common/tile_copy.cuh"
#include "kernels/sm80/block.cuh"

namespace anyflash::sm80 {

// What the threads of a block have in common of keys and values in pages; without pages, nothing.
template <bool kPaged>
struct KeyPages {
  __device__ __forceinline__ KeyPages(const Arguments&, const Block&) {}
  __device__ __forceinline__ void pin() {}
};

template <>
struct KeyPages<true> {
  const int32_t* table;  // of the sequence
  char* keys;            // the first row of page 0
  char* values;
  uint32_t first_row;
  uint32_t last_row;  // behind it the table may end

  __device__ __forceinline__ KeyPages(const Arguments& a, const Block& b)
      : table(a.attention.block_table + b.sequence.index * a.attention.block_table_stride),
        keys(strided_rows(a.attention.k, true, 0, 0, b.key_head(a)).data),
        values(strided_rows(a.attention.v, true, 0, 0, b.key_head(a)).data),
        first_row(uint32_t(b.sequence.first_k)),
        last_row(uint32_t(b.sequence.first_k + b.sequence.seqlen_k - 1)) {}

  // For a thread with registers to spare.
  __device__ __forceinline__ void pin() {
    table = ptx::opaque(table);
    keys = ptx::opaque(keys);
    values = ptx::opaque(values);
  }
};

// Where a thread finds its rows of a tile, for TileCopy: keys() and values(), one tile after the
// other. Without pages they lie a constant distance apart, and the places walk.
template <bool kPaged, typename Copy, typename CopyV>
class KeyTiles {
 public:
  __device__ __forceinline__ KeyTiles(const Arguments& a, const Block& b, const KeyPages<kPaged>&,
                                      uint32_t thread, int32_t first_key)
      : a_(a),
        keys_(place(Copy(thread), a, b, a.attention.k, first_key)),
        values_(place(CopyV(thread), a, b, a.attention.v, first_key)) {}

  // Before the first tile.
  __device__ __forceinline__ void find(int32_t) {}

  // On to the tile that begins at a key, so many tiles away.
  __device__ __forceinline__ void next(int32_t, int32_t steps) {
    keys_.skip(steps * a_.k_tile_bytes);
    values_.skip(steps * a_.v_tile_bytes);
  }
  __device__ __forceinline__ StridedRows& keys() { return keys_; }
  __device__ __forceinline__ StridedRows& values() { return values_; }

 private:
  template <typename AnyCopy>
  __device__ __forceinline__ static StridedRows place(const AnyCopy& copy, const Arguments& a,
                                                      const Block& b, const Rows& rows,
                                                      int32_t first_key) {
    const Sequence& s = b.sequence;
    const bool packed = a.attention.cu_seqlens_k != nullptr;
    return copy.place(strided_rows(rows, packed, s.index, s.first_k, b.key_head(a)), first_key);
  }

  const Arguments& a_;
  StridedRows keys_;
  StridedRows values_;
};

// In pages of any size. The threads that share their rows look up some each, one or two, and what
// they find goes round by shuffles.
template <typename Copy, typename CopyV>
class KeyTiles<true, Copy, CopyV> {
  static constexpr int32_t kRowThreads = Copy::kRowThreads;
  static constexpr int32_t kFinds = (Copy::kRowsEach + kRowThreads - 1) / kRowThreads;
  static_assert(kRowThreads == CopyV::kRowThreads && Copy::kRowStep == CopyV::kRowStep);

  struct Place {
    char* found[kFinds];
    int32_t byte;

    __device__ __forceinline__ void pin() {}
    __device__ __forceinline__ char* chunk(int32_t further) const {
      const int32_t i = further / Copy::kRowStep;
      return ptx::shuffle(found[i / kRowThreads], i % kRowThreads, kRowThreads) + byte;
    }
  };

 public:
  __device__ __forceinline__ KeyTiles(const Arguments& a, const Block&, const KeyPages<true>& pages,
                                      uint32_t thread, int32_t)
      : a_(a), pages_(pages), thread_(thread) {}

  // Asks for the pages of the tile that begins at `key`; behind a matrix product they are there.
  // Rows that the sequence, which must have one, does not have are taken for its last.
  __device__ __forceinline__ void find(int32_t key) {
#pragma unroll
    for (int32_t i = 0; i < kFinds; ++i) {
      const int32_t own = key + Copy(thread_).own_row() + i * kRowThreads * Copy::kRowStep;
      const uint32_t row = smaller(pages_.first_row + uint32_t(own), pages_.last_row);
      const uint32_t entry = a_.page_size.quotient(row);
      page_[i] = uint32_t(ptx::load_4(pages_.table + entry));
      row_[i] = row - entry * a_.page_size.value;
    }
  }
  __device__ __forceinline__ void next(int32_t key, int32_t) { find(key); }

  __device__ __forceinline__ Place keys() const { return place(pages_.keys, a_.attention.k); }
  __device__ __forceinline__ Place values() const { return place(pages_.values, a_.attention.v); }

 private:
  __device__ __forceinline__ Place place(char* data, const Rows& rows) const {
    Place here{{}, Copy(thread_).byte()};
#pragma unroll
    for (int32_t i = 0; i < kFinds; ++i) {
      const int64_t offset = page_[i] * rows.batch_stride + row_[i] * rows.row_stride;
      here.found[i] = data + 2 * offset;
    }
    return here;
  }

  const Arguments& a_;
  const KeyPages<true>& pages_;
  const uint32_t thread_;
  uint32_t page_[kFinds];
  uint32_t row_[kFinds];  // in its page
};

}  // namespace anyflash::sm80
