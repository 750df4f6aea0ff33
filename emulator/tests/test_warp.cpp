// Warp instructions against the layouts of the PTX ISA, written down here a second time: element
// (row, column) of a fragment as a function of lane and register, and a plain triple loop.
#include <cstring>

#include "emulator/tests/run_kernel.h"

namespace {

struct Element {
  int row, col;
};

// 9.7.14.5.8 (m16n8k16) and 9.7.14.5.7 (m16n8k8, 16-bit types): `i` counts 16-bit elements of A and
// B, fp32 elements of C and D.
Element a_k16(int lane, int i) {
  return {lane / 4 + (i == 2 || i == 3 || i == 6 || i == 7 ? 8 : 0),
          lane % 4 * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
}
Element b_k16(int lane, int i) { return {lane % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0), lane / 4}; }
Element a_k8(int lane, int i) { return {lane / 4 + (i >= 2 ? 8 : 0), lane % 4 * 2 + (i & 1)}; }
Element b_k8(int lane, int i) { return {lane % 4 * 2 + i, lane / 4}; }
Element c_any(int lane, int i) { return {lane / 4 + (i >= 2 ? 8 : 0), lane % 4 * 2 + (i & 1)}; }

uint16_t fp16(float x) { return emu::fp32_to_fp16(x); }
uint16_t bf16(float x) { return emu::fp32_to_bf16(x); }

void check_mma(const char* name, int k, Element (*a_at)(int, int), Element (*b_at)(int, int),
               uint16_t (*narrow)(float)) {
  INFO(name);
  const int a_registers = k / 4;
  float a[16][16], b[16][8];
  for (int i = 0; i < 256; ++i) a[i / 16][i % 16] = small_number(i);
  for (int i = 0; i < 128; ++i) b[i / 8][i % 8] = small_number(1000 + i);
  Words in(kLanes * kWords);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < k / 2; ++i) {
      const Element at = a_at(lane, i);
      in[lane * kWords + i / 2] |= uint32_t(narrow(a[at.row][at.col])) << i % 2 * 16;
    }
    for (int i = 0; i < k / 4; ++i) {
      const Element at = b_at(lane, i);
      in[lane * kWords + a_registers + i / 2] |= uint32_t(narrow(b[at.row][at.col])) << i % 2 * 16;
    }
  }
  const Words out = run(name, in);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const Element at = c_any(lane, i);
      float expected = float(i);
      for (int j = 0; j < k; ++j) expected += a[at.row][j] * b[j][at.col];
      CHECK(emu::bits_float(out[lane * kWords + i]) == expected);
    }
  }
}

}  // namespace

TEST_CASE("mma fragments") {
  check_mma("mma_m16n8k16_f16", 16, a_k16, b_k16, fp16);
  check_mma("mma_m16n8k16_bf16", 16, a_k16, b_k16, bf16);
  check_mma("mma_m16n8k8_f16", 8, a_k8, b_k8, fp16);
  check_mma("mma_m16n8k8_bf16", 8, a_k8, b_k8, bf16);
}

// 9.7.14.5.15: matrix m has its row r at the address of lane 8 m + r; a lane gets elements
// (lane / 4, lane % 4 * 2 + {0, 1}), of the transposed matrix with .trans.
TEST_CASE("ldmatrix") {
  struct Variant {
    const char* name;
    int count;
    bool transposed;
  };
  for (const Variant v :
       {Variant{"ldmatrix_x1", 1, false}, Variant{"ldmatrix_x2", 2, false},
        Variant{"ldmatrix_x4", 4, false}, Variant{"ldmatrix_x1_trans", 1, true},
        Variant{"ldmatrix_x2_trans", 2, true}, Variant{"ldmatrix_x4_trans", 4, true}}) {
    INFO(v.name);
    Words in(kLanes * kWords);
    for (uint32_t lane = 0; lane < 32; ++lane) in[lane * kWords] = (lane * 11 + 5) % 32 * 16;
    const Words out = run(v.name, in);
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < v.count; ++m) {
        for (int e = 0; e < 2; ++e) {
          int row = lane / 4, col = lane % 4 * 2 + e;
          if (v.transposed) std::swap(row, col);
          const uint32_t expected = in[(m * 8 + row) * kWords] / 2 + col;
          CHECK((out[lane * kWords + m] >> e * 16 & 0xFFFF) == expected);
        }
      }
    }
  }
}

TEST_CASE("stmatrix") {  // 9.7.14.5.16: the same, the other way
  struct Variant {
    const char* name;
    int count;
    bool transposed;
  };
  for (const Variant v :
       {Variant{"stmatrix_x1", 1, false}, Variant{"stmatrix_x2", 2, false},
        Variant{"stmatrix_x4", 4, false}, Variant{"stmatrix_x4_trans", 4, true}}) {
    INFO(v.name);
    Words in(kLanes * kWords);
    for (uint32_t lane = 0; lane < 32; ++lane) {
      in[lane * kWords] = (lane * 11 + 5) % 32 * 16;
      for (uint32_t m = 0; m < 4; ++m) {
        const uint32_t low = 1000 + m * 64 + lane * 2;
        in[lane * kWords + 1 + m] = low | (low + 1) << 16;
      }
    }
    Words out(128);
    CHECK(run_reported(v.name, in, out).text() == "");
    std::vector<uint16_t> expected(256);
    for (int m = 0; m < v.count; ++m) {
      for (int lane = 0; lane < 32; ++lane) {
        for (int e = 0; e < 2; ++e) {
          int row = lane / 4, col = lane % 4 * 2 + e;
          if (v.transposed) std::swap(row, col);
          expected[in[(m * 8 + row) * kWords] / 2 + col] = uint16_t(1000 + m * 64 + lane * 2 + e);
        }
      }
    }
    CHECK(std::memcmp(out.data(), expected.data(), 512) == 0);
  }
}

TEST_CASE("movmatrix") {  // 9.7.14.5.17: the transposed 8 x 8 matrix
  Words in(kLanes * kWords);
  for (uint32_t lane = 0; lane < 32; ++lane) in[lane * kWords] = lane * 2 | (lane * 2 + 1) << 16;
  const Words out = run("movmatrix", in);
  for (uint32_t lane = 0; lane < 32; ++lane) {
    for (uint32_t e = 0; e < 2; ++e) {
      const uint32_t row = lane % 4 * 2 + e, col = lane / 4;  // of the source: 8 numbers per row
      CHECK((out[lane * kWords] >> e * 16 & 0xFFFF) == row * 8 + col);
    }
  }
}

// 9.7.9.6: c holds a clamp in bits 0 to 4 and a segment mask in bits 8 to 12.
TEST_CASE("shfl") {
  struct Mode {
    const char* name;
    int (*source)(int lane, int b);
    bool limit_is_lowest;
  };
  const Mode modes[] = {
      {"shfl_up", [](int lane, int b) { return lane - b; }, true},
      {"shfl_down", [](int lane, int b) { return lane + b; }, false},
      {"shfl_bfly", [](int lane, int b) { return lane ^ b; }, false},
  };
  for (const Mode& mode : modes) {
    for (const int width : {32, 16, 8}) {
      for (const int b : {0, 1, 3, 9}) {
        const uint32_t segment = 32 - width;
        const uint32_t c = segment << 8 | (mode.limit_is_lowest ? 0 : 31);
        INFO(mode.name << " width " << width << " b " << b);
        Words in(kLanes * kWords);
        for (uint32_t lane = 0; lane < 32; ++lane) {
          uint32_t* x = &in[lane * kWords];
          x[0] = 100 + lane;
          x[1] = b;
          x[2] = c;
          x[3] = ~0u;
        }
        const Words out = run(mode.name, in);
        for (int lane = 0; lane < 32; ++lane) {
          const int first = lane / width * width, last = first + width - 1;
          const int source = mode.source(lane, b);
          const bool valid = mode.limit_is_lowest ? source >= first : source <= last;
          CHECK(out[lane * kWords] == uint32_t(100 + (valid ? source : lane)));
          CHECK(out[lane * kWords + 1] == uint32_t(valid));
        }
      }
    }
  }
}

TEST_CASE("shfl.idx") {
  Words in(kLanes * kWords);
  for (uint32_t lane = 0; lane < 32; ++lane) {
    uint32_t* x = &in[lane * kWords];
    x[0] = 100 + lane;
    x[1] = lane * 7 % 32;
    x[2] = 24 << 8 | 31;  // segments of 8
    x[3] = ~0u;
  }
  const Words out = run("shfl_idx", in);
  for (uint32_t lane = 0; lane < 32; ++lane) {  // the segment's bits of the own lane, the rest of b
    CHECK(out[lane * kWords] == 100 + ((lane & 24) | (lane * 7 % 32 & 7)));
  }
}

TEST_CASE("votes") {
  Words in(kLanes * kWords);
  for (uint32_t lane = 0; lane < 32; ++lane) in[lane * kWords] = lane / 4;
  const Words out = run("votes", in);
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint32_t* y = &out[lane * kWords];
    CHECK(y[0] == 0xF0F0F0F0);
    CHECK(y[1] == 0);
    CHECK(y[2] == 1);
    CHECK(y[3] == 0);
    CHECK(y[4] == 0xFu << lane / 4 * 4);
    CHECK(y[5] == 0);
    CHECK(y[6] == 0);
    CHECK((y[7] >> lane & 1) == 1);  // the others may have left already
  }
}

TEST_CASE("redux") {
  Words in(kLanes * kWords);
  for (uint32_t lane = 0; lane < 32; ++lane) in[lane * kWords] = lane - 1;  // -1, 0, ..., 30
  const Words out = run("reductions", in);
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const Words mine(&out[lane * kWords], &out[lane * kWords] + kWords);
    CHECK(mine == Words{464, 0, ~0u, ~0u, 30, 0, ~0u, ~0u ^ 31});  // 0 ^ ... ^ 30 = 31
  }
}

TEST_CASE("elect") {
  const Words out = run("elect", Words(kLanes * kWords));
  uint32_t elected = 0;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    elected += out[lane * kWords + 1];
    CHECK(out[out[0] * kWords + 1] == 1);
    CHECK(out[lane * kWords] == out[0]);
  }
  CHECK(elected == 1);
}

TEST_CASE("barrier reductions") {
  Words in(64 * kWords);
  for (uint32_t t = 0; t < 64; ++t) in[t * kWords] = t < 40;
  const Words out = run("barrier_reductions", in, 64);
  for (uint32_t t = 0; t < 64; ++t) {
    CHECK(out[t * kWords] == 40);
    CHECK(out[t * kWords + 1] == 0);
    CHECK(out[t * kWords + 2] == 1);
  }
}

TEST_CASE("cp.async fills what the source does not have with zeros") {  // 9.7.9.25.3.1
  for (const uint32_t size : {16u, 8u, 4u}) {
    INFO("cp.async of " << size);
    Words in(32 * size / 4 + 32);
    for (uint32_t i = 0; i < 32 * size / 4; ++i) in[i] = 0x01010101 * (i + 1);
    for (uint32_t lane = 0; lane < 32; ++lane) in[32 * size / 4 + lane] = lane % (size + 1);
    Words out(32 * size / 4);
    const std::string name = "cp_async_" + std::to_string(size);
    CHECK(run_reported(name.c_str(), in, out).text() == "");
    const auto* from = reinterpret_cast<const uint8_t*>(in.data());
    const auto* to = reinterpret_cast<const uint8_t*>(out.data());
    for (uint32_t i = 0; i < 32 * size; ++i) {
      const bool read = i % size < i / size % (size + 1);
      CHECK(int(to[i]) == (read ? int(from[i]) : 0));
    }
  }
}

TEST_CASE("atomics") {
  Words in(16, 5);
  in[9] = emu::float_bits(1.f);
  in[10] = 0;
  in[12] = in[13] = 0;
  for (const char* name : {"atomics_shared", "atomics_global"}) {
    INFO(name);
    Words out(16);
    CHECK(run_reported(name, in, out).text() == "");
    CHECK(out[0] == 17);
    CHECK(int(out[1]) == -7);
    CHECK(int(out[2]) == -3);
    CHECK(out[3] == 5);
    CHECK(out[4] == (5u & 0xFF & 0x1FE & 0x3FC & 0x7F8));
    CHECK(out[5] == (5 | 15));
    CHECK(out[6] == (5 ^ 15));
    CHECK(out[7] == 0);  // 5 wraps to 0, 1, 2, 0
    CHECK(out[8] == 2);  // 5 > 2: 2, 1, 0, 2
    CHECK(emu::bits_float(out[9]) == 3.f);
    CHECK(out[10] == 4);  // 0 -> 1 -> 2 -> 3 -> 4 in the order of the threads
    CHECK(out[11] == 5);
    CHECK(out[13] == 2);  // 4 * 2^31
    CHECK(out[12] == 0);
    CHECK(out[14] == 77);
  }
}

TEST_CASE("generic addresses") {
  for (const uint32_t in_shared : {0u, 1u}) {
    Words out(64, 7);
    CHECK(run_reported("generic", {in_shared}, out).text() == "");
    for (uint32_t i = 0; i < 32; ++i) {
      CHECK(out[i] == 100 + 31 - i);
      CHECK(out[32 + i] == (in_shared ? 7 : 100 + i));
    }
  }
}

TEST_CASE("no result, no visible effect, early exit") {
  Words in = {5}, out(34, 0);
  CHECK(run_reported("quiet", in, out).text() == "");
  CHECK(out[0] == 32 * 5);
  CHECK(out[1] == 31);
  for (uint32_t i = 0; i < 32; ++i) CHECK(out[2 + i] == (i < 16 ? i : 0));
}

TEST_CASE("what nvcc makes of C++") {
  const uint32_t table[] = {2, 3, 5, 7, 11, 13, 17, 19};
  Words in(kLanes * kWords);
  for (uint32_t i = 0; i < in.size(); ++i) in[i] = i * 2654435761u >> 8;
  for (uint32_t lane = 0; lane < 32; ++lane) in[lane * kWords + 3] = lane % 7;
  const Words out = run("compiled", in);
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint32_t* x = &in[lane * kWords];
    const uint32_t* y = &out[lane * kWords];
    const uint32_t cases[] = {10, x[0], x[1] + 5, x[2] ^ 9, uint32_t(__builtin_popcount(x[0])),
                              99, 99};
    CHECK(y[0] == x[x[1] & 7] + table[x[1] & 7]);
    CHECK(y[1] == x[0] * 3 + x[x[2] & 7] + table[x[2] & 7]);
    CHECK(y[2] == in[(31 - lane) * kWords]);
    CHECK(y[3] == emu::float_bits(0.5f * float(x[0])));
    CHECK(y[4] == cases[x[3]]);
    CHECK(y[5] == uint32_t((uint64_t(x[0]) << 32 | x[1]) / (x[2] + 1)));
    CHECK(y[6] == x[3]);
    CHECK(y[7] == x[2]);
  }
}
