#include "emulator/runtime/bank_conflicts.h"

#include <algorithm>

namespace emu {

namespace {

struct LoggedAccess {
  const void* site;
  uint32_t visit;  // how often the lane has been there
  uint32_t offset;
  uint8_t lane;
  uint8_t bytes;
};
std::vector<std::vector<LoggedAccess>> logs;  // per warp

// One instruction of a warp: 8-byte accesses go by half warps, 16-byte ones by quarters.
void count_request(const LoggedAccess* accesses, size_t count) {
  const int bytes = accesses[0].bytes;
  const int words_each = std::max(1, bytes / 4);
  const int lanes_each = 32 / words_each;
  size_t i = 0;
  while (i < count) {
    uint32_t touched[32];
    int n = 0;
    const int part = accesses[i].lane / lanes_each;
    for (; i < count && accesses[i].lane / lanes_each == part; ++i) {
      for (int k = 0; k < words_each; ++k) touched[n++] = accesses[i].offset / 4 + k;
    }
    ++result.stats.shared_ideal;
    result.stats.shared_wavefronts += wavefronts(touched, n);
  }
}

}  // namespace

void log_shared_access(const void* site, uint32_t offset, int bytes) {
  logs[self->warp->index].push_back({site, 0, offset, uint8_t(self->lane), uint8_t(bytes)});
}

int wavefronts(const uint32_t* words_of_access, int count) {
  uint32_t in_bank[32][32];
  int different[32] = {};
  int most = 1;
  for (int i = 0; i < count; ++i) {
    const uint32_t word = words_of_access[i];
    uint32_t* bank = in_bank[word % 32];
    int& n = different[word % 32];
    if (std::find(bank, bank + n, word) != bank + n) continue;
    bank[n++] = word;
    most = std::max(most, n);
  }
  return most;
}

void count_bank_conflicts(Warp& warp) {
  std::vector<LoggedAccess>& log = logs[warp.index];
  if (log.empty()) return;
  // The n-th visit of every lane to one place is one instruction of the warp.
  const auto by_lane = [](const LoggedAccess& a, const LoggedAccess& b) {
    return a.site != b.site ? a.site < b.site : a.lane < b.lane;
  };
  const auto by_visit = [](const LoggedAccess& a, const LoggedAccess& b) {
    return a.site != b.site ? a.site < b.site : a.visit < b.visit;
  };
  std::stable_sort(log.begin(), log.end(), by_lane);
  for (size_t i = 1; i < log.size(); ++i) {
    const bool again = log[i].site == log[i - 1].site && log[i].lane == log[i - 1].lane;
    log[i].visit = again ? log[i - 1].visit + 1 : 0;
  }
  std::stable_sort(log.begin(), log.end(), by_visit);
  for (size_t begin = 0, end; begin < log.size(); begin = end) {
    end = begin + 1;
    while (end < log.size() && !by_visit(log[begin], log[end])) ++end;
    count_request(&log[begin], end - begin);
  }
  log.clear();
}

void begin_block_bank_conflicts() {
  logs.resize(block.num_warps);
  for (auto& log : logs) log.clear();
}

}  // namespace emu
