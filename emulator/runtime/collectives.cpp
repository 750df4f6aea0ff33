#include "emulator/runtime/collectives.h"

#include <algorithm>

#include "emulator/runtime/bank_conflicts.h"

namespace emu {

namespace {

constexpr const char* kNames[] = {"bar.warp.sync", "shfl", "vote",     "match",    "redux",
                                  "elect",         "mma",  "ldmatrix", "stmatrix", "movmatrix"};

const char* name(int instruction) { return kNames[instruction / kVariants]; }
bool is_aligned(int instruction) { return instruction / kVariants >= int(Instruction::mma); }
bool is_complete(const Meeting& meeting, const Warp& warp) {
  return meeting.arrived == (meeting.mask & warp.live);
}

// The open meeting of this mask, else a free one. 32 are enough: an open one keeps a lane waiting.
Meeting& find_meeting(Warp& warp, uint32_t mask) {
  for (uint32_t open = warp.open; open; open &= open - 1) {
    Meeting& meeting = warp.meetings[__builtin_ctz(open)];
    if (meeting.mask == mask) return meeting;
  }
  return warp.meetings[__builtin_ctz(~warp.open)];
}

template <typename Visit>
void for_each_lane(uint32_t mask, Visit&& visit) {
  for (; mask; mask &= mask - 1) visit(__builtin_ctz(mask));
}

Exchange& mine() { return self->warp->exchange[self->lane]; }

}  // namespace

Meeting& begin_meeting(int instruction, uint32_t mask, const void* site) {
  Warp& warp = *self->warp;
  const uint32_t lane = 1u << self->lane;
  if (!(mask & lane)) {
    EMU_FAIL("divergence", site, "%s whose mask 0x%08x does not contain its lane %d",
             name(instruction), mask, self->lane);
  }
  Meeting& meeting = find_meeting(warp, mask);
  if (!meeting.arrived) {
    meeting.mask = mask;
    meeting.instruction = instruction;
    meeting.site = site;
    warp.open |= 1u << (&meeting - warp.meetings);
  } else if (meeting.instruction != instruction) {
    EMU_FAIL("divergence", site, "lane %d of warp %d executes %s while others execute %s",
             self->lane, warp.index, name(instruction), name(meeting.instruction));
  } else if (is_aligned(instruction) && meeting.site != site) {
    EMU_FAIL("divergence", site, "lanes of warp %d execute %s in different places, others at %s",
             warp.index, name(instruction), source_lines(meeting.site).c_str());
  }
  if (is_aligned(instruction) && warp.live != kFullWarp) {
    EMU_FAIL("divergence", site, "%s in a warp whose lanes 0x%08x have exited", name(instruction),
             ~warp.live);
  }
  meeting.arrived |= lane;
  return meeting;
}

bool last_of(Meeting& meeting) {
  const uint32_t turn = meeting.turn;
  while (!is_complete(meeting, *self->warp)) {
    wait(name(meeting.instruction), -1, meeting.site);
    if (meeting.turn != turn) return false;
  }
  count_bank_conflicts(*self->warp);
  return true;
}

void end_lane_meetings(Warp& warp) {
  for (const Meeting& meeting : warp.meetings) {
    if (!meeting.arrived) continue;
    if (is_aligned(meeting.instruction)) {
      EMU_FAIL("divergence", meeting.site, "lane %d exits while others of warp %d execute %s",
               self->lane, warp.index, name(meeting.instruction));
    }
    if (!is_complete(meeting, warp)) continue;
    wake(block.threads[warp.index * 32 + __builtin_ctz(meeting.arrived)]);
  }
}

void syncwarp(uint32_t mask) {
  meet(Instruction::syncwarp, 0, mask, EMU_SITE, [&](Warp& warp) {
    static std::vector<Clock> joined;
    joined.assign(block.clock_width, 0);
    Thread* lanes = &block.threads[warp.index * 32];
    for_each_lane(mask & warp.live, [&](int i) { join(joined.data(), lanes[i].clock); });
    for_each_lane(mask & warp.live, [&](int i) {
      std::copy(joined.begin(), joined.end(), lanes[i].clock);
      lanes[i].tick();
    });
  });
}

uint32_t shfl(Shuffle mode, uint32_t value, uint32_t b, uint32_t c, uint32_t mask, bool* in_range) {
  const void* site = EMU_SITE;
  // PTX ISA, "shfl.sync".
  const int lane = self->lane;
  const int segment = int(c >> 8 & 31);
  const int clamp = int(c & 31);
  const int distance = int(b & 31);
  const int first = lane & segment;
  const int bound = first | (clamp & ~segment);
  int source = 0;
  switch (mode) {
    case Shuffle::up:
      source = lane - distance;
      break;
    case Shuffle::down:
      source = lane + distance;
      break;
    case Shuffle::bfly:
      source = lane ^ distance;
      break;
    case Shuffle::idx:
      source = first | (distance & ~segment);
      break;
  }
  const bool valid = mode == Shuffle::up ? source >= bound : source <= bound;
  if (!valid) source = lane;
  if (in_range) *in_range = valid;
  mine().value = value;
  mine().number = uint32_t(source);
  meet(Instruction::shfl, int(mode), mask, site, [&](Warp& warp) {
    ++result.stats.shuffles;
    const uint32_t present = mask & warp.live;
    for_each_lane(present, [&](int i) {
      const uint32_t from = warp.exchange[i].number;
      if (!(present >> from & 1)) {
        report("divergence", site,
               "lane %d reads from lane %u, which is not in mask 0x%08x or exited", i, from, mask);
      }
      warp.exchange[i].answer = uint32_t(warp.exchange[from].value);
    });
  });
  return mine().answer;
}

uint32_t ballot(uint32_t mask, bool predicate) {
  mine().number = predicate;
  meet(Instruction::vote, 0, mask, EMU_SITE, [&](Warp& warp) {
    uint32_t votes = 0;
    const uint32_t present = mask & warp.live;
    for_each_lane(present, [&](int i) { votes |= warp.exchange[i].number << i; });
    for_each_lane(present, [&](int i) { warp.exchange[i].answer = votes; });
  });
  return mine().answer;
}

bool vote(Vote mode, uint32_t mask, bool predicate) {
  mine().number = predicate;
  meet(Instruction::vote, 1 + int(mode), mask, EMU_SITE, [&](Warp& warp) {
    const uint32_t present = mask & warp.live;
    uint32_t votes = 0;
    for_each_lane(present, [&](int i) { votes |= warp.exchange[i].number << i; });
    const bool all = votes == present;
    const bool answer = mode == Vote::all   ? all
                        : mode == Vote::any ? votes != 0
                                            : all || votes == 0;
    for_each_lane(present, [&](int i) { warp.exchange[i].answer = answer; });
  });
  return mine().answer;
}

uint32_t match_any(uint32_t mask, uint64_t value) {
  mine().value = value;
  meet(Instruction::match, 0, mask, EMU_SITE, [&](Warp& warp) {
    const uint32_t present = mask & warp.live;
    for_each_lane(present, [&](int i) {
      uint32_t same = 0;
      for_each_lane(present, [&](int j) {
        same |= uint32_t(warp.exchange[i].value == warp.exchange[j].value) << j;
      });
      warp.exchange[i].answer = same;
    });
  });
  return mine().answer;
}

uint32_t match_all(uint32_t mask, uint64_t value) {
  mine().value = value;
  meet(Instruction::match, 1, mask, EMU_SITE, [&](Warp& warp) {
    const uint32_t present = mask & warp.live;
    const uint64_t first = warp.exchange[__builtin_ctz(present)].value;
    bool same = true;
    for_each_lane(present, [&](int i) { same &= warp.exchange[i].value == first; });
    for_each_lane(present, [&](int i) { warp.exchange[i].answer = same ? mask : 0; });
  });
  return mine().answer;
}

namespace {

template <typename T>
T reduce(Reduce op, uint32_t mask, T value, int variant, const void* site) {
  mine().value = uint64_t(value);
  meet(Instruction::redux, variant + int(op), mask, site, [&](Warp& warp) {
    const uint32_t present = mask & warp.live;
    T total = T(warp.exchange[__builtin_ctz(present)].value);
    for_each_lane(present & (present - 1), [&](int i) {
      const T x = T(warp.exchange[i].value);
      switch (op) {
        case Reduce::add:
          total = T(uint32_t(total) + uint32_t(x));
          break;
        case Reduce::min:
          total = std::min(total, x);
          break;
        case Reduce::max:
          total = std::max(total, x);
          break;
        case Reduce::and_:
          total &= x;
          break;
        case Reduce::or_:
          total |= x;
          break;
        case Reduce::xor_:
          total ^= x;
          break;
      }
    });
    for_each_lane(present, [&](int i) { warp.exchange[i].answer = uint32_t(total); });
  });
  return T(mine().answer);
}

}  // namespace

uint32_t redux_u32(Reduce op, uint32_t mask, uint32_t value) {
  return reduce<uint32_t>(op, mask, value, 0, EMU_SITE);
}

int32_t redux_s32(Reduce op, uint32_t mask, int32_t value) {
  return reduce<int32_t>(op, mask, value, 8, EMU_SITE);
}

bool elect(uint32_t mask, uint32_t* leader) {
  meet(Instruction::elect, 0, mask, EMU_SITE, [&](Warp& warp) {
    const uint32_t present = mask & warp.live;
    for_each_lane(present, [&](int i) { warp.exchange[i].answer = __builtin_ctz(present); });
  });
  if (leader) *leader = mine().answer;
  return int(mine().answer) == self->lane;
}

uint32_t activemask() { return self->warp->live; }

}  // namespace emu
