// Warp instructions: every lane of the mask arrives, the last one computes for all.
#pragma once

#include "emulator/runtime/block.h"
#include "emulator/runtime/report.h"

namespace emu {

// From mma on: .aligned, all 32 lanes at the same place in the program.
enum class Instruction {
  syncwarp,
  shfl,
  vote,
  match,
  redux,
  elect,
  mma,
  ldmatrix,
  stmatrix,
  movmatrix
};

constexpr uint32_t kFullWarp = ~0u;

// The meeting of the lanes that execute `instruction`, a kind and a variant (type, count, ...).
Meeting& begin_meeting(int instruction, uint32_t mask, const void* site);
// Waits until all have arrived. True for the lane that has to compute, false when that is done.
bool last_of(Meeting& meeting);

constexpr int kVariants = 64;

inline Meeting& arrive(int instruction, uint32_t mask, const void* site) {
  Warp& warp = *self->warp;
  const uint32_t lane = 1u << self->lane;
  Meeting& usual = warp.meetings[0];
  if ((warp.open & 1) && usual.instruction == instruction && usual.mask == mask &&
      usual.site == site && (mask & lane)) {
    usual.arrived |= lane;
    return usual;
  }
  return begin_meeting(instruction, mask, site);
}

inline void part(Meeting& meeting) {
  Warp& warp = *self->warp;
  warp.runnable |= meeting.arrived;
  warp.open &= ~(1u << (&meeting - warp.meetings));
  meeting.arrived = 0;
  ++meeting.turn;
}

template <typename Compute>
void meet(Instruction kind, int variant, uint32_t mask, const void* site, Compute&& compute) {
  Meeting& meeting = arrive(int(kind) * kVariants + variant, mask, site);
  if (!last_of(meeting)) return;
  compute(*self->warp);
  part(meeting);
}

// A lane has exited: those who waited for it go on.
void end_lane_meetings(Warp& warp);

}  // namespace emu
