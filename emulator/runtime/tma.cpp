// cp.async.bulk.tensor (TMA, tiled mode) and cp.async.bulk.
//
// A box of the tensor lies in shared memory row by row, without gaps. Swizzling exchanges the
// 16-byte pieces of a row: bits 4 to 6 of the shared address are xored with bits 7 to 9 (128-byte
// swizzle; fewer bits for the others). PTX ISA, "Tensor swizzling modes".
#include <algorithm>

#include "emulator/runtime/bulk_copy.h"
#include "emulator/runtime/report.h"
#include "emulator/runtime/shared_memory.h"
#include "emulator/runtime/swizzle.h"

namespace emu {

namespace {

constexpr uint32_t kSharedAlignment = 128;

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = map.element_bytes;
  for (uint32_t i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

// The piece at byte `at` of a row that starts at global address `row`, null outside the tensor.
Piece piece_of_row(const TensorMap& map, uint32_t offset, int32_t first_element, uint32_t at,
                   const uint64_t* row) {
  const int64_t begin = int64_t(first_element) * map.element_bytes + at;  // in the tensor's row
  const int64_t row_bytes = int64_t(map.size[0]) * map.element_bytes;
  const int64_t from = std::max<int64_t>(begin, 0);
  const int64_t to = std::min<int64_t>(begin + kPieceBytes, row_bytes);
  if (!row || from >= to) return {offset, 0, 0, 0};
  return {offset, uint8_t(from - begin), uint8_t(to - begin), *row + uint64_t(from)};
}

Pieces tile(const TensorMap& map, uint32_t offset, const int32_t* coordinates) {
  const uint32_t row_bytes = map.box[0] * map.element_bytes;
  Pieces pieces;
  pieces.reserve(box_bytes(map) / kPieceBytes);
  uint32_t num_rows = 1;
  for (uint32_t i = 1; i < map.rank; ++i) num_rows *= map.box[i];
  for (uint32_t r = 0; r < num_rows; ++r) {
    bool inside = true;
    uint64_t row = map.base;
    for (uint32_t i = 1, rest = r; i < map.rank; rest /= map.box[i], ++i) {
      const int64_t x = int64_t(coordinates[i]) + rest % map.box[i];
      inside &= x >= 0 && x < int64_t(map.size[i]);
      row += uint64_t(x) * map.stride[i];
    }
    for (uint32_t at = 0; at < row_bytes; at += kPieceBytes) {
      const uint32_t to = swizzled(offset + r * row_bytes + at, map.swizzle);
      pieces.push_back(piece_of_row(map, to, coordinates[0], at, inside ? &row : nullptr));
    }
  }
  return pieces;
}

Pieces checked_tile(const TensorMap& map, uint32_t shared, const int32_t* coordinates,
                    const void* site) {
  if (map.magic != kTensorMapMagic) EMU_FAIL("tma", site, "not a tensor map");
  const uint32_t row_bytes = map.box[0] * map.element_bytes;
  if (row_bytes % kPieceBytes) EMU_FAIL("tma", site, "box rows of %u bytes", row_bytes);
  if (map.swizzle && row_bytes != map.swizzle) {
    EMU_FAIL("tma", site, "box rows of %u bytes with a swizzle of %u", row_bytes, map.swizzle);
  }
  const uint32_t offset =
      shared_offset(shared, box_bytes(map), kSharedAlignment, "tensor copy", site);
  const uint32_t pattern_bytes = 8 * map.swizzle;
  if (map.swizzle && offset % pattern_bytes) {
    report("misaligned", site, "tile with %u-byte swizzle at shared byte %u, not a multiple of %u",
           map.swizzle, offset, pattern_bytes);
  }
  return tile(map, offset, coordinates);
}

Pieces run_of_bytes(uint32_t shared, uint64_t global, uint32_t bytes, const void* site) {
  if (bytes % kPieceBytes || global % kPieceBytes) {
    EMU_FAIL("misaligned", site, "bulk copy of %u bytes at global address %#lx", bytes,
             static_cast<unsigned long>(global));
  }
  const uint32_t offset = shared_offset(shared, bytes, kPieceBytes, "bulk copy", site);
  Pieces pieces;
  for (uint32_t i = 0; i < bytes; i += kPieceBytes) {
    pieces.push_back({offset + i, 0, kPieceBytes, global + i});
  }
  return pieces;
}

}  // namespace

void tma_load(const TensorMap* map, uint32_t shared, uint32_t mbarrier,
              const int32_t* coordinates) {
  const void* site = EMU_SITE;
  issue_load(checked_tile(*map, shared, coordinates, site), mbarrier, site);
}

void tma_store(const TensorMap* map, uint32_t shared, const int32_t* coordinates) {
  const void* site = EMU_SITE;
  Pieces pieces = checked_tile(*map, shared, coordinates, site);
  issue_store(std::move(pieces), Into::global, site);
}

void tma_reduce_add(const TensorMap* map, uint32_t shared, const int32_t* coordinates) {
  const void* site = EMU_SITE;
  Pieces pieces = checked_tile(*map, shared, coordinates, site);
  issue_store(std::move(pieces), Into::global_add_fp32, site);
}

void bulk_load(uint32_t shared, uint64_t global, uint32_t bytes, uint32_t mbarrier) {
  const void* site = EMU_SITE;
  issue_load(run_of_bytes(shared, global, bytes, site), mbarrier, site);
}

void bulk_store(uint64_t global, uint32_t shared, uint32_t bytes) {
  const void* site = EMU_SITE;
  issue_store(run_of_bytes(shared, global, bytes, site), Into::global, site);
}

void bulk_reduce_add(uint64_t global, uint32_t shared, uint32_t bytes) {
  const void* site = EMU_SITE;
  issue_store(run_of_bytes(shared, global, bytes, site), Into::global_add_fp32, site);
}

}  // namespace emu
