// Runs kernels/cpu/rotary.h, every instance of this build that this CPU has, against a float64
// reference.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "catch.h"
#include "cpu_instances.h"
#include "kernels/rotary_params.h"
#include "tests/cpp/dtypes.h"
#include "tests/fuzz/guarded.h"

using anyflash::bf16;
using anyflash::CpuThreads;
using anyflash::Direction;
using anyflash::Dtype;
using anyflash::Family;
using anyflash::fp16;
using anyflash::fp32;
using anyflash::Instance;
using anyflash::RotaryParams;
using anyflash::Rows;
using anyflash::fuzz::Guarded;

namespace {

struct Case {
  std::vector<int64_t> lengths;  // of the sequences; dense: all alike
  int64_t heads, pairs, rest;    // rest: columns behind the pairs
  bool packed, interleaved, conjugate, fp32_tables;
  std::vector<int64_t> offsets;  // empty: none
  int64_t offset;
  int64_t gap;  // elements between heads, and between rows of the tables
};

const std::vector<Case>& cases() {
  static const std::vector<Case> all = [] {
    std::vector<Case> made = {
        {{}, 2, 4, 0, false, false, false, false, {}, 0, 0},
        {{0, 0}, 2, 4, 0, false, true, false, true, {1, 2}, 0, 0},
        {{5, 5, 5}, 1, 0, 7, false, false, false, false, {}, 0, 0},
        {{3, 0, 40}, 3, 9, 2, true, true, true, true, {1, 1 << 20, INT64_MAX}, 2, 5},
        {{600, 500}, 4, 64, 0, true, false, false, false, {}, 1, 0},
        {{2, 2}, 2, 600, 3, false, false, true, false, {}, 0, 0},
        {{2, 2}, 2, 600, 3, false, true, false, true, {9, 0}, 0, 1},
    };
    for (int64_t pairs = 1; pairs < 36; ++pairs) {  // every tail
      const bool odd = pairs % 2 != 0;
      made.push_back({{2}, 2, pairs, pairs % 3, odd, odd, !odd, pairs % 4 < 2, {}, 1, pairs % 5});
      made.push_back({{2}, 2, pairs, 0, !odd, !odd, odd, odd, {2}, 0, 0});
    }
    return made;
  }();
  return all;
}

// Rows of numbers with a gap behind each, NaN there. Ends at memory that nobody may touch.
template <typename T>
struct Matrix {
  Matrix(int64_t rows, int64_t columns, int64_t gap)
      : stride(columns + gap), size(rows * stride), memory(size * int64_t{sizeof(T)}, true) {
    for (int64_t i = 0; i < size; ++i) data()[i] = anyflash::stored<T>(NAN);
  }
  T* data() const { return memory.template as<T>(); }
  double at(int64_t row, int64_t column) const {
    return anyflash::number(data()[row * stride + column]);
  }
  void randomise(std::mt19937& generator, int64_t columns) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < size; ++i) {
      if (i % stride < columns) data()[i] = anyflash::stored<T>(normal(generator));
    }
  }
  int64_t stride, size;
  Guarded memory;
};

template <typename T>
class Check {
 public:
  explicit Check(const Case& c)
      : c_(c),
        dim_(2 * c.pairs + c.rest),
        tokens_(token_count()),
        x_(tokens_ * c.heads, dim_, c.gap),
        y_(tokens_ * c.heads, dim_, c.gap),
        cos_(kRows, c.pairs, c.gap),
        sin_(kRows, c.pairs, c.gap),
        cos_fp32_(kRows, c.pairs, c.gap),
        sin_fp32_(kRows, c.pairs, c.gap) {
    std::mt19937 generator(7);
    x_.randomise(generator, dim_);
    for (auto* table : {&cos_, &sin_}) table->randomise(generator, c.pairs);
    for (auto* table : {&cos_fp32_, &sin_fp32_}) table->randomise(generator, c.pairs);
    ends_.push_back(0);
    for (const int64_t length : c.lengths) ends_.push_back(ends_.back() + length);
  }

  void run(const Instance* instance, const CpuThreads* threads, bool inplace) {
    const RotaryParams p = params(inplace);
    REQUIRE(anyflash_launch(instance, &p, const_cast<CpuThreads*>(threads)) == 0);
  }

  // Writes y from x, then x in place; both must be the reference's.
  void compare(const Instance* instance, const CpuThreads* threads) {
    std::vector<double> exact;
    for (int64_t token = 0; token < tokens_; ++token) {
      for (int64_t head = 0; head < c_.heads; ++head) {
        for (int64_t i = 0; i < dim_; ++i) exact.push_back(expected(token, head, i));
      }
    }
    run(instance, threads, false);
    holds(y_, exact);
    run(instance, threads, true);
    CHECK(x_.memory == y_.memory);
  }

  bool same_bits(const Check& other) const { return y_.memory == other.y_.memory; }

 private:
  static constexpr int64_t kRows = 700;

  int64_t token_count() const {
    int64_t count = c_.packed ? 3 : 0;  // three of no sequence
    for (const int64_t length : c_.lengths) count += length;
    return count;
  }

  Rows rows_of(const Matrix<T>& m) const {
    const int64_t row = c_.heads * m.stride;
    const int64_t seqlen = c_.packed || c_.lengths.empty() ? 0 : c_.lengths[0];
    return {m.data(), seqlen * row, row, m.stride};
  }

  RotaryParams params(bool inplace) const {
    RotaryParams p{};
    p.x = rows_of(x_);
    p.y = inplace ? p.x : rows_of(y_);
    p.cos = c_.fp32_tables ? static_cast<const void*>(cos_fp32_.data()) : cos_.data();
    p.sin = c_.fp32_tables ? static_cast<const void*>(sin_fp32_.data()) : sin_.data();
    p.cos_stride = cos_.stride;
    p.sin_stride = sin_.stride;
    p.tables_are_fp32 = c_.fp32_tables;
    p.interleaved = c_.interleaved;
    p.conjugate = c_.conjugate;
    p.cu_seqlens = c_.packed ? ends_.data() : nullptr;
    p.seqlen_offsets = c_.offsets.empty() ? nullptr : c_.offsets.data();
    p.seqlen_offset = c_.offset;
    p.batch = static_cast<int64_t>(c_.lengths.size());
    p.seqlen = c_.packed ? tokens_ : c_.lengths.empty() ? 0 : c_.lengths[0];
    p.heads = c_.heads;
    p.head_dim = dim_;
    p.pairs = c_.pairs;
    p.seqlen_rotary = kRows;
    return p;
  }

  // Negative where there is none.
  int64_t position(int64_t token) const {
    for (size_t i = 0; i < c_.lengths.size(); ++i) {
      if (token >= ends_[i + 1]) continue;
      const int64_t offset = c_.offsets.empty() ? 0 : c_.offsets[i];
      if (offset >= kRows) return -1;
      const int64_t found = token - ends_[i] + c_.offset + offset;
      return found < kRows ? found : -1;
    }
    return -1;
  }

  double expected(int64_t token, int64_t head, int64_t column) const {
    const int64_t row = token * c_.heads + head, at = position(token);
    if (at < 0 || column >= 2 * c_.pairs) return x_.at(row, column);
    const int64_t pair = c_.interleaved ? column / 2 : column % c_.pairs;
    const bool second = c_.interleaved ? column % 2 != 0 : column >= c_.pairs;
    const int64_t other = c_.interleaved ? column ^ 1
                          : second       ? column - c_.pairs
                                         : column + c_.pairs;
    const double cos = c_.fp32_tables ? cos_fp32_.at(at, pair) : cos_.at(at, pair);
    const double sin = c_.fp32_tables ? sin_fp32_.at(at, pair) : sin_.at(at, pair);
    const double sign = second != c_.conjugate ? 1 : -1;
    return x_.at(row, column) * cos + sign * x_.at(row, other) * sin;
  }

  void holds(const Matrix<T>& m, const std::vector<double>& exact) const {
    const double epsilon = std::is_same_v<T, fp32>   ? 0x1p-24
                           : std::is_same_v<T, fp16> ? 0x1p-11
                                                     : 0x1p-8;
    int64_t wrong = 0;
    for (int64_t row = 0; row < tokens_ * c_.heads; ++row) {
      for (int64_t i = 0; i < m.stride; ++i) {
        const double got = m.at(row, i);
        if (i >= dim_) {
          wrong += !std::isnan(got);  // the gap
        } else {
          const double want = exact[static_cast<size_t>(row * dim_ + i)];
          wrong += !(std::fabs(got - want) <= 1.01 * epsilon * std::fabs(want) + 4e-6);
        }
      }
    }
    CHECK(wrong == 0);
  }

  const Case& c_;
  int64_t dim_, tokens_;
  Matrix<T> x_, y_, cos_, sin_;
  Matrix<fp32> cos_fp32_, sin_fp32_;
  std::vector<int64_t> ends_;
};

template <typename T>
void check_all(Dtype dtype) {
  const CpuThreads threads{&parallel_for, 4};
  int instances = 0;
  for (const char* arch : cpu_archs(Family::rotary)) {
    const Instance* instance = cpu_instance(Family::rotary, Direction::forward, dtype, arch);
    if (instance == nullptr) continue;  // avx512bf16 has bf16 alone
    ++instances;
    for (const Case& c : cases()) {
      CAPTURE(arch, c.lengths, c.heads, c.pairs, c.rest, c.packed, c.interleaved, c.fp32_tables);
      Check<T> check(c), parallel(c);
      check.compare(instance, nullptr);
      parallel.run(instance, &threads, false);
      CHECK(check.same_bits(parallel));
    }
  }
  CHECK((instances > 0 || anyflash_cpu_isa() == 0));
}

}  // namespace

TEST_CASE("cpu rotary: fp16", "[cpu][rotary]") { check_all<fp16>(Dtype::fp16); }
TEST_CASE("cpu rotary: bf16", "[cpu][rotary]") { check_all<bf16>(Dtype::bf16); }
TEST_CASE("cpu rotary: fp32", "[cpu][rotary]") { check_all<fp32>(Dtype::fp32); }

TEST_CASE("cpu rotary: more pairs than columns are an error", "[cpu][rotary]") {
  for (const char* arch : cpu_archs(Family::rotary)) {
    RotaryParams p{};
    p.head_dim = 3;
    p.pairs = 2;
    const Instance* instance = cpu_instance(Family::rotary, Direction::forward, Dtype::bf16, arch);
    CHECK(anyflash_launch(instance, &p, nullptr) == anyflash::kErrorInvalidParams);
  }
}
