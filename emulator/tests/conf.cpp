// Does the emulator do what a GPU does? Runs the instructions of conf_kernels.cu on fixed inputs
// and writes what every lane got, or compares with such a file:
//
//   conf write FILE KERNELS     KERNELS: conf_kernels.cu as machine code (tools/nvrtc.py)
//   conf compare FILE           on the emulator, which has the kernels: ctest does
//
// Results must have the same bits, but for two groups:
//   - sums of mma and wgmma: tensor cores align products to the largest and cut off; sums here are
//     below 256, so that 2^-12 is a few roundings, and a misplaced element is off by more;
//   - ex2, lg2, rcp, rsqrt, sqrt, sin, cos: the PTX ISA allows 2^-20 or so; tanh: 2^-10.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "emulator/driver/driver_api.h"

using namespace driver_api;

namespace {

using Words = std::vector<uint32_t>;
constexpr uint32_t kWords = 8;  // of each thread, as in warp_kernels.cu
constexpr uint32_t kSharedBytes = 20 * 1024;
constexpr int kSkipped = 77;

struct alignas(64) Map {  // a CUtensorMap
  uint64_t opaque[16];
};

struct Section {
  std::string name;
  Words results;
  double slack;  // allowed difference, absolute and relative, of results as floats; 0: same bits
};
std::vector<Section> sections;

// ---- inputs: a linear congruential generator, the same everywhere ----

uint32_t random_bits() {
  static uint32_t state = 12345;
  state = state * 1664525u + 1013904223u;
  return state >> 8 | state << 24;
}
float random_float(float magnitude) {
  return (float(random_bits() % 20001) / 10000 - 1) * magnitude;
}
// Two numbers of +-[1, 2): random sign and mantissa below the exponent of 1.
uint32_t random_bf16_pair() { return (random_bits() & 0x807F807F) | 0x3F803F80; }
uint32_t random_fp16_pair() { return (random_bits() & 0x83FF83FF) | 0x3C003C00; }

Words filled(size_t count, const std::function<uint32_t(size_t)>& word) {
  Words words(count);
  for (size_t i = 0; i < count; ++i) words[i] = word(i);
  return words;
}

// `own` are the first words of every thread.
Words per_thread(uint32_t threads, const std::function<Words(uint32_t)>& own) {
  Words words(threads * kWords);
  for (uint32_t t = 0; t < threads; ++t) {
    const Words mine = own(t);
    std::copy(mine.begin(), mine.end(), words.begin() + t * kWords);
  }
  return words;
}

// ---- running ----

const Driver& gpu = Driver::get();
Module kernels;

bool has_kernel(const char* name) {
  Function function;
  return gpu.get_function(&function, kernels, name) == 0;
}

DevicePointer on_device(const Words& words) {
  DevicePointer pointer;
  require(gpu.allocate(&pointer, words.size() * 4), "cuMemAlloc");
  require(gpu.copy_in(pointer, words.data(), words.size() * 4), "cuMemcpyHtoD");
  return pointer;
}

void to_host(Words& words, DevicePointer from) {
  require(gpu.copy_out(words.data(), from, words.size() * 4), "cuMemcpyDtoH");
}

// `map` may be the kernel's third parameter.
void add(const char* name, const char* kernel, uint32_t threads, const Words& in, size_t out_words,
         double slack, Map* map = nullptr) {
  Section section{name, Words(out_words), slack};
  DevicePointer from = on_device(in);
  DevicePointer to = on_device(section.results);
  Function function;
  require(gpu.get_function(&function, kernels, kernel), kernel);
  void* arguments[] = {&to, &from, map};
  require(gpu.launch(function, 1, 1, 1, threads, 1, 1, kSharedBytes, nullptr, arguments, nullptr),
          kernel);
  require(gpu.synchronize(), kernel);
  to_host(section.results, to);
  gpu.release(from);
  gpu.release(to);
  sections.push_back(section);
}

void add_warp(const char* name, const char* kernel, const Words& in, double slack = 0) {
  add(name, kernel, 32, in, 32 * kWords, slack);
}

constexpr double kSums = 0x1p-12;

void run_warp_instructions() {
  const auto fp16 = [](uint32_t) { return filled(6, [](size_t) { return random_fp16_pair(); }); };
  const auto bf16 = [](uint32_t) { return filled(6, [](size_t) { return random_bf16_pair(); }); };
  add_warp("mma.m16n8k16.f16", "mma_m16n8k16_f16", per_thread(32, fp16), kSums);
  add_warp("mma.m16n8k16.bf16", "mma_m16n8k16_bf16", per_thread(32, bf16), kSums);
  add_warp("mma.m16n8k8.f16", "mma_m16n8k8_f16", per_thread(32, fp16), kSums);
  add_warp("mma.m16n8k8.bf16", "mma_m16n8k8_bf16", per_thread(32, bf16), kSums);

  const Words rows = per_thread(32, [](uint32_t lane) { return Words{(lane * 11 + 5) % 32 * 16}; });
  add_warp("ldmatrix.x1", "ldmatrix_x1", rows);
  add_warp("ldmatrix.x2", "ldmatrix_x2", rows);
  add_warp("ldmatrix.x4", "ldmatrix_x4", rows);
  add_warp("ldmatrix.x1.trans", "ldmatrix_x1_trans", rows);
  add_warp("ldmatrix.x2.trans", "ldmatrix_x2_trans", rows);
  add_warp("ldmatrix.x4.trans", "ldmatrix_x4_trans", rows);
  const auto word = [](uint32_t) { return Words{random_bits()}; };
  add_warp("movmatrix", "movmatrix", per_thread(32, word));

  for (const uint32_t width : {32u, 8u}) {
    const uint32_t segment = (32 - width) << 8;
    const auto input = [&](uint32_t clamp) {
      return per_thread(32, [&](uint32_t) {
        return Words{random_bits(), random_bits() % 32, segment | clamp, ~0u};
      });
    };
    const std::string suffix = " width " + std::to_string(width);
    add_warp(("shfl.up" + suffix).c_str(), "shfl_up", input(0));
    add_warp(("shfl.down" + suffix).c_str(), "shfl_down", input(31));
    add_warp(("shfl.bfly" + suffix).c_str(), "shfl_bfly", input(31));
    add_warp(("shfl.idx" + suffix).c_str(), "shfl_idx", input(31));
  }
  add_warp("redux", "reductions", per_thread(32, word));

  const auto copy = [](uint32_t size) {
    return filled(32 * size / 4 + 32, [size](size_t i) {
      return i < 32 * size / 4 ? random_bits() : random_bits() % (size + 1);
    });
  };
  add("cp.async 16", "cp_async_16", 32, copy(16), 128, 0);
  add("cp.async 8", "cp_async_8", 32, copy(8), 64, 0);
  add("cp.async 4", "cp_async_4", 32, copy(4), 32, 0);

  const uint32_t special[] = {0,          0x80000000, 1,          0x007FFFFF,
                              0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x00800000};
  const auto number = [&](uint32_t t) {
    if (t < 8) return special[t];
    const float x = random_float(t < 64 ? 3.f : 20.f);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
  };
  const Words numbers =
      per_thread(256, [&](uint32_t t) { return Words{number(t), number((t + 13) % 256)}; });
  Words finite = numbers;  // sin and cos of infinity say nothing
  finite[4 * kWords] = finite[5 * kWords] = finite[6 * kWords] = 0x3F800000;
  add("functions", "functions", 256, finite, 256 * kWords, 0x1p-19);
  add("tanh", "tanh_approx", 256, numbers, 256 * kWords, 0x1p-10);
  add("cvt", "conversions", 256, numbers, 256 * kWords, 0);
}

// 3 x 20 x 40 numbers of 16 bits, rows of 96 bytes; a box of 2 x 8 x (swizzle / 2).
Map tensor_map(DevicePointer data, uint32_t box0, int32_t swizzle) {
  Map map;
  const uint64_t size[] = {40, 20, 3}, strides[] = {96, 1920};
  const uint32_t box[] = {box0, 8, 2}, steps[] = {1, 1, 1};
  require(gpu.encode_tiled(&map, kTypeBfloat16, 3, reinterpret_cast<void*>(data), size, strides,
                           box, steps, 0, swizzle, 0, 0),
          "cuTensorMapEncodeTiled");
  return map;
}

void run_tensor_copies() {
  struct Mode {
    const char* name;
    int32_t swizzle;
    uint32_t box0;
  };
  const Mode modes[] = {{"none", kSwizzleNone, 24},
                        {"32", kSwizzle32, 16},
                        {"64", kSwizzle64, 32},
                        {"128", kSwizzle128, 64}};
  const Words tensor = filled(3 * 20 * 24, [](size_t) { return random_bits(); });
  for (const Mode& mode : modes) {
    const DevicePointer data = on_device(tensor);
    Map map = tensor_map(data, mode.box0, mode.swizzle);
    const uint32_t bytes = mode.box0 * 8 * 2 * 2;
    const std::string swizzle = std::string(" swizzle ") + mode.name;
    add(("TMA load, inside," + swizzle).c_str(), "tma_load_3d", 128, Words{8, 3, 1, bytes},
        bytes / 4, 0, &map);
    add(("TMA load, low corner," + swizzle).c_str(), "tma_load_3d", 128,
        Words{uint32_t(-5), uint32_t(-2), uint32_t(-1), bytes}, bytes / 4, 0, &map);
    add(("TMA load, high corner," + swizzle).c_str(), "tma_load_3d", 128, Words{30, 15, 2, bytes},
        bytes / 4, 0, &map);
    Words image = {20, 15, 2, bytes};
    for (uint32_t i = 0; i < bytes / 4; ++i) image.push_back(random_bits());
    add("", "tma_store_3d", 128, image, 1, 0, &map);
    sections.back() = {"TMA store," + swizzle, Words(tensor.size()), 0};
    to_host(sections.back().results, data);
    gpu.release(data);
  }
}

void run_hopper_instructions() {
  const Words registers = per_thread(32, [](uint32_t lane) {
    return Words{(lane * 11 + 5) % 32 * 16, random_bits(), random_bits(), random_bits(),
                 random_bits()};
  });
  add("stmatrix.x1", "stmatrix_x1", 32, registers, 128, 0);
  add("stmatrix.x2", "stmatrix_x2", 32, registers, 128, 0);
  add("stmatrix.x4", "stmatrix_x4", 32, registers, 128, 0);
  add("stmatrix.x4.trans", "stmatrix_x4_trans", 32, registers, 128, 0);
  add("mbarrier phases", "mbarrier_phases", 64, Words(1), 12, 0);
  run_tensor_copies();

  // Raw images: whatever the layout makes of random numbers is the result.
  struct Layout {
    const char* name;
    uint32_t mode, leading, stride, step;  // as hopper_kernels.cu describes them
  };
  const Layout rows[] = {
      {"128", 1, 16, 1024, 32}, {"32", 3, 16, 256, 2048}, {"none", 0, 128, 1024, 256}};
  const Layout columns = {"128", 1, 8192, 1024, 2048};
  const auto input = [](const Layout& a, const Layout& b, uint32_t (*pair)()) {
    Words in = {0, a.leading, a.stride, a.step, 8192, b.leading, b.stride, b.step, a.mode};
    in.resize(16);
    for (int i = 0; i < 4096 + 2048; ++i) in.push_back(pair());
    return in;
  };
  const auto product = [&](const std::string& name, const char* kernel, const Words& in) {
    add(name.c_str(), kernel, 128, in, 128 * 32, kSums);
  };
  for (const Layout& layout : rows) {
    product(std::string("wgmma K-major, swizzle ") + layout.name, "wgmma_bf16",
            input(layout, layout, random_bf16_pair));
  }
  product("wgmma f16, negated", "wgmma_f16_negated", input(rows[0], rows[0], random_fp16_pair));
  product("wgmma B MN-major", "wgmma_bf16_b_transposed", input(rows[0], columns, random_bf16_pair));
  product("wgmma A, B MN-major", "wgmma_bf16_both_transposed",
          input(columns, columns, random_bf16_pair));
  product("wgmma A in registers", "wgmma_f16_registers", input(rows[0], columns, random_fp16_pair));
}

// ---- files: "name: count", then the words, eight to a line ----

int write(const char* path) {
  FILE* file = std::fopen(path, "w");
  require(file ? 0 : -1, "writing the file");
  for (const Section& section : sections) {
    std::fprintf(file, "%s: %zu", section.name.c_str(), section.results.size());
    for (size_t i = 0; i < section.results.size(); ++i) {
      std::fprintf(file, "%c%08x", i % 8 ? ' ' : '\n', section.results[i]);
    }
    std::fprintf(file, "\n");
  }
  std::printf("%zu sections written to %s\n", sections.size(), path);
  return std::fclose(file) ? 1 : 0;
}

std::map<std::string, Words> read(FILE* file) {
  std::map<std::string, Words> known;
  char name[128];
  size_t count;
  while (std::fscanf(file, " %127[^:]: %zu", name, &count) == 2) {
    Words& words = known[name];
    words.resize(count);
    for (uint32_t& word : words) {
      require(std::fscanf(file, "%x", &word) == 1 ? 0 : -1, "reading the file, which ends early,");
    }
  }
  std::fclose(file);
  return known;
}

bool agree(uint32_t here, uint32_t there, double slack) {
  if (here == there) return true;
  float a, b;
  std::memcpy(&a, &here, 4);
  std::memcpy(&b, &there, 4);
  if (slack == 0) return false;
  return std::isnan(a) ? std::isnan(b) : std::fabs(double(a) - b) <= slack * (1 + std::fabs(b));
}

int compare(const char* path) {
  FILE* file = std::fopen(path, "r");
  if (!file) {
    std::printf("%zu sections ran; nothing to compare with: no GPU has written %s yet\n",
                sections.size(), path);
    return kSkipped;
  }
  const std::map<std::string, Words> known = read(file);
  int failures = 0;
  for (const Section& section : sections) {
    const auto entry = known.find(section.name);
    if (entry == known.end()) {
      std::printf("%s: not in the file\n", section.name.c_str());
      continue;
    }
    const Words& there = entry->second;
    size_t wrong = there.size() != section.results.size(), first = 0;
    for (size_t i = 0; i < there.size() && i < section.results.size(); ++i) {
      if (agree(section.results[i], there[i], section.slack)) continue;
      if (wrong++ == 0) first = i;
    }
    if (!wrong) continue;
    ++failures;
    std::printf("%s: %zu of %zu words differ, the first is %zu: %08x here, %08x there\n",
                section.name.c_str(), wrong, there.size(), first, section.results[first],
                there[first]);
  }
  std::printf("%zu sections, %d differ from %s\n", sections.size(), failures, path);
  return failures != 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string action = count > 2 ? arguments[1] : "";
  const bool known = action == "write" || action == "compare";
  require(known ? 0 : -1, "conf write FILE [KERNELS], conf compare FILE:");
  std::string code;
  if (count > 3) {
    std::ifstream file(arguments[3], std::ios::binary);
    code.assign(std::istreambuf_iterator<char>(file), {});
  }
  require(gpu.load_module(&kernels, code.data()), "cuModuleLoadData");
  run_warp_instructions();
  if (has_kernel("wgmma_bf16")) run_hopper_instructions();
  return action == "write" ? write(arguments[2]) : compare(arguments[2]);
}
