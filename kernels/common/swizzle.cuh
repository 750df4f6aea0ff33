// Tiles of 16-bit elements in shared memory, laid out so that ldmatrix and 16-byte copies meet no
// bank twice.
//
// A row is cut into 16-byte chunks, chunks into atoms of 128 bytes (64 where the row is no multiple
// of 128). Within its atom, chunk c of row r lies at c ^ phase(r): eight rows that follow each
// other put the same chunk into eight different groups of four banks.
#pragma once

#include "kernels/portable.h"

namespace anyflash {

constexpr int32_t kChunkElements = 8;
constexpr int32_t kChunkBytes = 16;

template <int32_t kColumns>
struct SwizzledTile {
  static_assert(kColumns % 32 == 0, "rows of whole 64-byte atoms");

  static constexpr int32_t kRowBytes = 2 * kColumns;
  static constexpr int32_t kAtomChunks = kRowBytes % 128 == 0 ? 8 : 4;
  static constexpr int32_t kAtomBytes = kAtomChunks * kChunkBytes;
  static constexpr int32_t kAtoms = kRowBytes / kAtomBytes;

  ANYFLASH_HOST_DEVICE static constexpr int32_t bytes(int32_t rows) { return rows * kRowBytes; }

  // Rows of 64-byte multiples begin in turn at the first and the 17th bank, which makes up for the
  // missing bit.
  ANYFLASH_HOST_DEVICE static uint32_t phase(uint32_t row) {
    return kAtomChunks == 8 ? row % 8 : row / 2 % 4;
  }

  ANYFLASH_HOST_DEVICE static uint32_t offset(uint32_t row, uint32_t chunk) {
    return row * kRowBytes + chunk / kAtomChunks * kAtomBytes +
           (chunk % kAtomChunks ^ phase(row)) * kChunkBytes;
  }
};

// Where one lane reads for ldmatrix: rows `row` + multiples of 8 that keep the phase, chunk pairs
// 0, 1, ... of which it reads one half. Everything but the lane's own address is known to the
// compiler.
template <int32_t kColumns>
struct TileReader {
  using Tile = SwizzledTile<kColumns>;

  uint32_t address;      // shared memory, of the lane's row in chunk pair 0
  uint32_t further = 0;  // bytes from there, whole tiles

  ANYFLASH_HOST_DEVICE static uint32_t address_of(uint32_t tile, uint32_t row, uint32_t half) {
    return tile + Tile::offset(row, half);
  }

  // The same place in the tile that lies so far behind; it has as many bytes to a row.
  ANYFLASH_HOST_DEVICE TileReader in(uint32_t bytes) const { return {address, further + bytes}; }

  // row_step: a multiple of 8.
  ANYFLASH_HOST_DEVICE uint32_t at(uint32_t row_step, uint32_t pair) const {
    return at_chunk(row_step, 2 * pair);
  }
  ANYFLASH_HOST_DEVICE uint32_t at_chunk(uint32_t row_step, uint32_t chunk) const {
    return (address ^ chunk % Tile::kAtomChunks * kChunkBytes) + row_step * Tile::kRowBytes +
           chunk / Tile::kAtomChunks * Tile::kAtomBytes + further;
  }
};

}  // namespace anyflash
