// What TMA and cp.async.bulk have in common: a list of 16-byte pieces that is copied some time
// after the issue, by the copy engine of the issuing warp.
#pragma once

#include <vector>

#include "emulator/runtime/block.h"

namespace emu {

constexpr uint32_t kPieceBytes = 16;

// 16 bytes of shared memory and the part of them that exists in global memory; the rest is zero.
struct Piece {
  uint32_t offset;
  uint8_t begin, end;
  uint64_t global;  // address of byte `begin`
};
using Pieces = std::vector<Piece>;

enum class Into { global, global_add_fp32 };

void issue_load(Pieces pieces, uint32_t mbarrier, const void* site);
void issue_store(Pieces pieces, Into into, const void* site);

}  // namespace emu
