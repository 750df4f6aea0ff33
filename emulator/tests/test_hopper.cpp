// sm_90 instructions against the layouts of the PTX ISA, written down a second time.
#include <functional>

#include "emulator/tests/run_kernel.h"

namespace {

emu::Result launch_with_map(const char* name, const Words& in, Words& out,
                            const emu::TensorMap& map) {
  emu::Buffer<uint32_t> from(in.size());
  emu::Buffer<uint32_t> to(out.size());
  std::copy(in.begin(), in.end(), from.begin());
  uint32_t* to_pointer = to.data();
  const uint32_t* from_pointer = from.data();
  emu::TensorMap parameter = map;
  void* arguments[] = {&to_pointer, &from_pointer, &parameter};
  emu::launch_registered(name, {1}, {128}, 16384 + 64, arguments);
  std::copy(to.begin(), to.end(), out.begin());
  return emu::take_result();
}

Words run_with_map(const char* name, const Words& in, Words out, const emu::TensorMap& map) {
  CHECK(launch_with_map(name, in, out, map).text() == "");
  return out;
}

// 5.5.6: where 16-byte chunk `chunk` of row `row` lies in a row of `swizzle` bytes.
uint32_t swizzled_chunk(uint32_t swizzle, uint32_t row, uint32_t chunk) {
  switch (swizzle) {
    case 128:
      return chunk ^ row % 8;
    case 64:  // two rows in 128 bytes
      return chunk ^ row / 2 % 4;
    case 32:  // four rows in 128 bytes
      return chunk ^ row / 4 % 2;
    default:
      return chunk;
  }
}

// A tensor of 3 x 20 x 40 numbers of 16 bits, the innermost 40 wide in rows of 48.
struct Tensor {
  static constexpr uint32_t kSize[3] = {40, 20, 3};
  emu::Buffer<uint16_t> data{3 * 20 * 48};
  emu::TensorMap map{};

  Tensor(uint32_t box0, uint32_t box1, uint32_t swizzle) {
    for (size_t i = 0; i < data.size(); ++i) data[i] = uint16_t(i + 1);
    map.base = reinterpret_cast<uint64_t>(data.data());
    map.rank = 3;
    map.element_bytes = 2;
    map.swizzle = swizzle;
    std::copy(kSize, kSize + 3, map.size);
    map.stride[1] = 96;
    map.stride[2] = 20 * 96;
    map.box[0] = uint16_t(box0);
    map.box[1] = uint16_t(box1);
    map.box[2] = 2;
    map.magic = emu::kTensorMapMagic;
  }
  uint16_t* at(int x, int y, int z) {
    const bool inside = x >= 0 && x < 40 && y >= 0 && y < 20 && z >= 0 && z < 3;
    return inside ? &data[(z * 20 + y) * 48 + x] : nullptr;
  }
};

void for_each_in_box(const Tensor& tensor, uint32_t swizzle,
                     const std::function<void(uint32_t, int, int, int)>& visit) {
  const uint32_t row_bytes = tensor.map.box[0] * 2;
  for (int z = 0; z < 2; ++z) {
    for (int y = 0; y < tensor.map.box[1]; ++y) {
      for (int x = 0; x < tensor.map.box[0]; ++x) {
        const uint32_t row = z * tensor.map.box[1] + y;
        const uint32_t chunk = swizzled_chunk(swizzle, row, x / 8);
        visit(row * row_bytes + chunk * 16 + x % 8 * 2, x, y, z);
      }
    }
  }
}

struct Corner {
  int x, y, z;
};

}  // namespace

TEST_CASE("mbarrier phases") {  // 9.7.13.15: a test of the phase before the current one succeeds
  Words out(12);
  CHECK(run_reported("mbarrier_phases", Words(1), out, 64).text() == "");
  CHECK(out == Words{0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 0});
}

TEST_CASE("cp.async.mbarrier.arrive") {
  Words in(32), out(32);
  for (uint32_t i = 0; i < 32; ++i) in[i] = i * 3;
  CHECK(run_reported("cp_async_arrives", in, out).text() == "");
  for (uint32_t i = 0; i < 32; ++i) CHECK(out[i] == (31 - i) * 3);
}

TEST_CASE("TMA load: swizzles, corners outside of the tensor") {
  for (const uint32_t swizzle : {0u, 32u, 64u, 128u}) {
    for (const Corner corner :
         {Corner{0, 0, 0}, Corner{8, 3, 1}, Corner{-5, 15, 2}, Corner{30, -2, -1}}) {
      INFO("swizzle " << swizzle << " at " << corner.x << "," << corner.y << "," << corner.z);
      Tensor tensor(swizzle ? swizzle / 2 : 24, 8, swizzle);
      const uint32_t bytes = tensor.map.box[0] * 8 * 2 * 2;
      const Words in = {uint32_t(corner.x), uint32_t(corner.y), uint32_t(corner.z), bytes};
      const Words out = run_with_map("tma_load_3d", in, Words(bytes / 4), tensor.map);
      const auto* image = reinterpret_cast<const unsigned char*>(out.data());
      int wrong = 0;
      for_each_in_box(tensor, swizzle, [&](uint32_t offset, int x, int y, int z) {
        const uint16_t* source = tensor.at(corner.x + x, corner.y + y, corner.z + z);
        uint16_t loaded;
        std::memcpy(&loaded, image + offset, 2);
        wrong += loaded != (source ? *source : 0);
      });
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("TMA with a bad tensor map") {
  Tensor tensor(64, 8, 128);
  Words in = {0, 0, 0, 64 * 8 * 2 * 2}, out(1);
  tensor.map.magic = 0;
  CHECK(launch_with_map("tma_load_3d", in, out, tensor.map).has("tma"));
}

TEST_CASE("TMA store leaves alone what is outside of the tensor") {
  for (const uint32_t swizzle : {0u, 64u, 128u}) {
    const Corner corner = {20, 15, 2};
    Tensor tensor(swizzle ? swizzle / 2 : 24, 8, swizzle);
    const uint32_t bytes = tensor.map.box[0] * 8 * 2 * 2;
    Words in = {uint32_t(corner.x), uint32_t(corner.y), uint32_t(corner.z), bytes};
    in.resize(4 + bytes / 4);
    auto* image = reinterpret_cast<unsigned char*>(&in[4]);
    std::vector<uint16_t> expected(tensor.data.begin(), tensor.data.end());
    for_each_in_box(tensor, swizzle, [&](uint32_t offset, int x, int y, int z) {
      const uint16_t value = uint16_t(50000 + offset / 2);
      std::memcpy(image + offset, &value, 2);
      const uint16_t* target = tensor.at(corner.x + x, corner.y + y, corner.z + z);
      if (target) expected[target - tensor.data.data()] = value;
    });
    run_with_map("tma_store_3d", in, Words(1), tensor.map);
    CHECK(std::vector<uint16_t>(tensor.data.begin(), tensor.data.end()) == expected);
  }
}

TEST_CASE("TMA reduction") {
  emu::Buffer<float> sums(16 * 4);
  std::fill(sums.begin(), sums.end(), 1.f);
  emu::TensorMap map{};
  map.base = reinterpret_cast<uint64_t>(sums.data());
  map.rank = 3;
  map.element_bytes = 4;
  const uint32_t size[3] = {16, 4, 1};
  std::copy(size, size + 3, map.size);
  map.stride[1] = 64;
  map.stride[2] = 256;
  map.box[0] = 8;
  map.box[1] = 4;
  map.box[2] = 1;
  map.magic = emu::kTensorMapMagic;
  Words in = {12, 1, 0, 128};
  for (uint32_t i = 0; i < 32; ++i) in.push_back(emu::float_bits(float(i)));
  run_with_map("tma_reduce_3d", in, Words(1), map);
  for (int y = 0; y < 4; ++y) {
    for (int x = 0; x < 16; ++x) {
      const float added = x >= 12 && y >= 1 ? float((y - 1) * 8 + x - 12) : 0.f;
      CHECK(sums[y * 16 + x] == 1.f + added);
    }
  }
}

TEST_CASE("bulk copies") {
  Words in(64), out(64);
  for (uint32_t i = 0; i < 64; ++i) in[i] = emu::float_bits(float(i));
  CHECK(run_reported("bulk_copies", in, out).text() == "");
  for (uint32_t i = 0; i < 64; ++i) CHECK(emu::bits_float(out[i]) == 2.f * float(i));
}

namespace {

// An operand of 64 (m or n) x 64 (k) numbers in shared memory, by 9.7.15.5.1 ("Shared Memory Matrix
// Layout"): core matrices of 8 rows x 16 bytes, or swizzled rows.
struct Layout {
  uint32_t mode;     // of the descriptor
  uint32_t swizzle;  // bytes; 0: none
  bool k_major;
  uint32_t leading, stride, step;  // of the descriptor, in bytes

  uint32_t offset(uint32_t i, uint32_t k) const {
    if (swizzle == 0) {  // K-major; core matrices side by side along k every `leading` bytes
      return i / 8 * stride + k / 8 * leading + i % 8 * 16 + k % 8 * 2;
    }
    const uint32_t width = swizzle / 2;  // numbers in a row of `swizzle` bytes
    const uint32_t row = k_major ? i : k, column = k_major ? k : i;
    const uint32_t within = column % width;
    const uint32_t panel = column / width * 64 * swizzle;  // 64 rows each
    return panel + row * swizzle + swizzled_chunk(swizzle, row, within / 8) * 16 + within % 8 * 2;
  }
};

// Steps of 16 along k. K-major swizzled: 32 bytes within the row (and the next panel when the row
// is full, which one descriptor step cannot do: such layouts hold one panel per step). MN-major: 16
// rows.
const Layout kRows128 = {1, 128, true, 16, 1024, 32};
const Layout kRows32 = {3, 32, true, 16, 256, 64 * 32};
const Layout kCores = {0, 0, true, 128, 1024, 256};
const Layout kColumns128 = {1, 128, false, 8192, 1024, 2048};

void check_wgmma(const char* name, const Layout& a_layout, const Layout& b_layout,
                 uint16_t (*narrow)(float), float sign = 1) {
  INFO(name << ", mode " << a_layout.mode << " and " << b_layout.mode);
  float a[64][64], b[64][64];  // (m, k), (n, k)
  for (int i = 0; i < 4096; ++i) {
    a[i / 64][i % 64] = small_number(i);
    b[i / 64][i % 64] = small_number(5000 + i);
  }
  Words in(16 + 4096 + 4 * 128 * 4);
  const Layout* layouts[] = {&a_layout, &b_layout};
  for (uint32_t operand = 0; operand < 2; ++operand) {
    const Layout& layout = *layouts[operand];
    const Words fields = {operand * 8192, layout.leading, layout.stride, layout.step};
    std::copy(fields.begin(), fields.end(), in.begin() + operand * 4);
    for (uint32_t i = 0; i < 64; ++i) {
      for (uint32_t k = 0; k < 64; ++k) {
        const uint16_t number = narrow(operand == 0 ? a[i][k] : b[i][k]);
        auto* image = reinterpret_cast<unsigned char*>(&in[16]) + operand * 8192;
        std::memcpy(image + layout.offset(i, k), &number, 2);
      }
    }
  }
  in[8] = a_layout.mode;
  const bool registers = std::string(name).find("registers") != std::string::npos;
  for (int step = 0; step < 4; ++step) {  // A from registers: the fragment of mma.m16n8k16 per warp
    for (int t = 0; t < 128; ++t) {
      for (int i = 0; i < 8; ++i) {
        const int row = t / 32 * 16 + t % 32 / 4 + (i / 2 % 2) * 8;
        const int column = step * 16 + t % 4 * 2 + i % 2 + i / 4 * 8;
        in[16 + 4096 + (step * 128 + t) * 4 + i / 2] |= uint32_t(narrow(a[row][column]))
                                                        << i % 2 * 16;
      }
    }
  }
  Words out(128 * 32);
  CHECK(run_reported(name, in, out, 128, 1, 16384).text() == "");
  int wrong = 0;
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < 32; ++i) {  // 9.7.15.5.1.1: the accumulator fragment
      const int row = t / 32 * 16 + t % 32 / 4 + (i / 2 % 2) * 8;
      const int column = i / 4 * 8 + t % 4 * 2 + i % 2;
      float expected = registers ? 0.f : float(i);
      for (int k = 0; k < 64; ++k) expected += sign * a[row][k] * b[column][k];
      wrong += emu::bits_float(out[t * 32 + i]) != expected;
    }
  }
  CHECK(wrong == 0);
}

}  // namespace

TEST_CASE("wgmma") {
  check_wgmma("wgmma_bf16", kRows128, kRows128, emu::fp32_to_bf16);
  check_wgmma("wgmma_bf16", kRows32, kRows32, emu::fp32_to_bf16);
  check_wgmma("wgmma_bf16", kCores, kCores, emu::fp32_to_bf16);
  check_wgmma("wgmma_f16_negated", kRows128, kRows128, emu::fp32_to_fp16, -1);
  check_wgmma("wgmma_bf16_b_transposed", kRows128, kColumns128, emu::fp32_to_bf16);
  check_wgmma("wgmma_bf16_both_transposed", kColumns128, kColumns128, emu::fp32_to_bf16);
  check_wgmma("wgmma_f16_registers", kRows128, kColumns128, emu::fp32_to_fp16);
}

TEST_CASE("griddepcontrol") {
  Words in(32, 7), out(32);
  CHECK(run_reported("dependent", in, out).text() == "");
  CHECK(out == in);
}

TEST_CASE("warpgroups and named barriers") {
  Words in(128), out(128);
  for (uint32_t i = 0; i < 128; ++i) in[i] = i * 5;
  CHECK(run_reported("warpgroups", in, out, 256).text() == "");
  for (uint32_t i = 0; i < 128; ++i) CHECK(out[i] == (127 - i) * 5);
}
