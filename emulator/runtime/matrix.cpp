// mma, ldmatrix, stmatrix, movmatrix: fragments as in PTX ISA, "Warp-level matrix instructions".
//
// Lane l works with row g = l / 4 and columns 2 (l % 4), 2 (l % 4) + 1 of every 8 x 8 matrix. A
// register holds two neighbours of a row, the left one in its lower half.
#include <algorithm>

#include "emulator/runtime/collectives.h"
#include "emulator/runtime/products.h"
#include "emulator/runtime/shared_memory.h"

namespace emu {

namespace {

Exchange& mine() { return self->warp->exchange[self->lane]; }

constexpr int row_of(int lane) { return lane / 4; }
constexpr int column_of(int lane) { return lane % 4 * 2; }

// d (16 x 8) += a (16 x K) b (K x 8). Every 8 of k take two registers of a, for rows g and g + 8,
// and one of b, for column g; d has two values of row g, then two of row g + 8.
template <int K, Type16 kType>
void multiply(Warp& warp) {
  constexpr int kPairs = K / 2;
  alignas(32) uint32_t a[16][kPairs];  // pairs of neighbours in a row
  alignas(32) uint32_t b[kPairs][8];   // pairs of neighbours in a column
  alignas(32) float d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int row = row_of(lane);
    const int pair = lane % 4;
    const auto* from_a = static_cast<const uint32_t*>(warp.exchange[lane].in[0]);
    const auto* from_b = static_cast<const uint32_t*>(warp.exchange[lane].in[1]);
    const auto* from_d = static_cast<const float*>(warp.exchange[lane].out);
    for (int half = 0; half < K / 8; ++half) {
      a[row][pair + half * 4] = from_a[half * 2];
      a[row + 8][pair + half * 4] = from_a[half * 2 + 1];
      b[pair + half * 4][row] = from_b[half];
    }
    std::memcpy(&d[row][pair * 2], from_d, 8);
    std::memcpy(&d[row + 8][pair * 2], from_d + 2, 8);
  }
  Words pairs;
  PairRow b_values[kPairs];
  for (int i = 0; i < kPairs; ++i) {
    for (int j = 0; j < 2; ++j) {
      std::memcpy(&pairs, b[i] + j * kWidth, sizeof pairs);
      unpack<kType>(pairs, b_values[i].even[j], b_values[i].odd[j]);
    }
  }
  for (int row = 0; row < 16; ++row) {
    Floats even[kPairs / kWidth], odd[kPairs / kWidth];
    for (int i = 0; i < kPairs / kWidth; ++i) {
      std::memcpy(&pairs, a[row] + i * kWidth, sizeof pairs);
      unpack<kType>(pairs, even[i], odd[i]);
    }
    add_products<kPairs>(d[row], reinterpret_cast<const float*>(even),
                         reinterpret_cast<const float*>(odd), b_values);
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* to_d = static_cast<float*>(warp.exchange[lane].out);
    std::memcpy(to_d, &d[row_of(lane)][column_of(lane)], 8);
    std::memcpy(to_d + 2, &d[row_of(lane) + 8][column_of(lane)], 8);
  }
  ++result.stats.mma;
}

template <int K>
void mma(float* d, const uint32_t* a, const uint32_t* b, Type16 type, const void* site) {
  mine().in[0] = a;
  mine().in[1] = b;
  mine().out = d;
  meet(Instruction::mma, K + int(type), kFullWarp, site, [&](Warp& warp) {
    if (type == Type16::f16) {
      multiply<K, Type16::f16>(warp);
    } else {
      multiply<K, Type16::bf16>(warp);
    }
  });
}

// Addresses of the rows of matrix i come from lanes 8 i to 8 i + 7.
constexpr uint32_t kRowBytes = 16;

unsigned char* row_address(const Warp& warp, int matrix, int row) {
  return shared_memory + warp.exchange[matrix * 8 + row].number;
}

// Rows are wavefronts in themselves where they lie in the same four banks.
void count_wavefronts(const Warp& warp, int matrix) {
  int different[8] = {};
  int most = 1;
  for (int i = 0; i < 8; ++i) {
    const uint32_t row = warp.exchange[matrix * 8 + i].number;
    bool is_new = true;
    for (int j = 0; j < i; ++j) is_new &= warp.exchange[matrix * 8 + j].number != row;
    if (is_new) most = std::max(most, ++different[row / kRowBytes % 8]);
  }
  ++result.stats.ldmatrix_ideal;
  result.stats.ldmatrix_wavefronts += most;
}

// Checks this lane's row, if it gives one, and shows it to the others.
void publish_row(uint32_t address, int count, Access access, const char* what, const void* site) {
  if (self->lane >= 8 * count) return;
  mine().number = shared_offset(address, kRowBytes, kRowBytes, what, site);
  track_shared(mine().number, kRowBytes, access, self->actor(), site);
}

int variant(int count, bool transposed) { return count * 2 + transposed; }

}  // namespace

void mma_m16n8k16(float d[4], const uint32_t a[4], const uint32_t b[2], Type16 type) {
  mma<16>(d, a, b, type, EMU_SITE);
}

void mma_m16n8k8(float d[4], const uint32_t a[2], const uint32_t b[1], Type16 type) {
  mma<8>(d, a, b, type, EMU_SITE);
}

void ldmatrix(uint32_t* r, int count, bool transposed, uint32_t address) {
  const void* site = EMU_SITE;
  publish_row(address, count, Access::read, "ldmatrix", site);
  mine().out = r;
  meet(Instruction::ldmatrix, variant(count, transposed), kFullWarp, site, [&](Warp& warp) {
    for (int i = 0; i < count; ++i) {
      uint16_t matrix[8][8];
      for (int row = 0; row < 8; ++row) {
        std::memcpy(matrix[row], row_address(warp, i, row), kRowBytes);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int row = row_of(lane);
        const int column = column_of(lane);
        const uint32_t low = transposed ? matrix[column][row] : matrix[row][column];
        const uint32_t high = transposed ? matrix[column + 1][row] : matrix[row][column + 1];
        static_cast<uint32_t*>(warp.exchange[lane].out)[i] = low | high << 16;
      }
      count_wavefronts(warp, i);
    }
  });
}

void stmatrix(const uint32_t* r, int count, bool transposed, uint32_t address) {
  const void* site = EMU_SITE;
  publish_row(address, count, Access::write, "stmatrix", site);
  mine().in[0] = r;
  meet(Instruction::stmatrix, variant(count, transposed), kFullWarp, site, [&](Warp& warp) {
    for (int i = 0; i < count; ++i) {
      uint16_t matrix[8][8];
      for (int lane = 0; lane < 32; ++lane) {
        const uint32_t value = static_cast<const uint32_t*>(warp.exchange[lane].in[0])[i];
        const int row = row_of(lane);
        const int column = column_of(lane);
        (transposed ? matrix[column][row] : matrix[row][column]) = uint16_t(value);
        (transposed ? matrix[column + 1][row] : matrix[row][column + 1]) = uint16_t(value >> 16);
      }
      for (int row = 0; row < 8; ++row) {
        std::memcpy(row_address(warp, i, row), matrix[row], kRowBytes);
      }
      count_wavefronts(warp, i);
    }
  });
}

uint32_t movmatrix(uint32_t a) {
  mine().number = a;
  meet(Instruction::movmatrix, 0, kFullWarp, EMU_SITE, [](Warp& warp) {
    uint16_t matrix[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      std::memcpy(&matrix[row_of(lane)][column_of(lane)], &warp.exchange[lane].number, 4);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int row = row_of(lane);
      const int column = column_of(lane);
      warp.exchange[lane].answer = matrix[column][row] | uint32_t(matrix[column + 1][row]) << 16;
    }
  });
  return mine().answer;
}

}  // namespace emu
