// What the tests of the kernels that append to a cache share: cases, a float64 reference, the error
// rule.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "catch.h"
#include "kernels/params.h"
#include "tests/cpp/dtypes.h"
#include "tests/fuzz/guarded.h"

namespace kvcache_append_cases {

using anyflash::bf16;
using anyflash::fp16;
using anyflash::fp32;
using anyflash::KvcacheAppendParams;
using anyflash::Rows;

struct Case {
  std::vector<int32_t> lengths;
  int64_t seqlen_new = 1, seqlen_q = 1;
  int64_t heads = 4, heads_k = 2;
  int64_t head_dim = 32, head_dim_v = 32;
  int64_t page_size = 24, pages_per_sequence = 1;
  std::vector<int32_t> table = {};  // empty: sequence i has page i
  int64_t rotary_dim = 0;
  bool interleaved = true;
  bool q_positions_move = true;
  int64_t gap = 0;      // elements between heads
  bool seqused = true;  // the new lengths are asked for
};

// (outer, rows, heads, columns) with a gap behind each head; NaN at first, there for good. Ends at
// memory that nobody may touch.
template <typename T>
class Tensor {
 public:
  Tensor(int64_t outer, int64_t rows, int64_t heads, int64_t columns, int64_t gap)
      : columns_(columns),
        head_stride_(columns + gap),
        row_stride_(heads * head_stride_),
        outer_stride_(rows * row_stride_),
        size_(outer * outer_stride_),
        memory_(size_ * int64_t{sizeof(T)}, true) {
    for (int64_t i = 0; i < size_; ++i) data()[i] = anyflash::stored<T>(NAN);
  }

  Rows rows() { return {data(), outer_stride_, row_stride_, head_stride_}; }
  T* at(int64_t outer, int64_t row, int64_t head) {
    return data() + outer * outer_stride_ + row * row_stride_ + head * head_stride_;
  }
  double value(int64_t outer, int64_t row, int64_t head, int64_t column) {
    return anyflash::number(at(outer, row, head)[column]);
  }
  void randomise(std::mt19937& generator) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < size_; ++i) {
      if (i % head_stride_ < columns_) data()[i] = anyflash::stored<T>(normal(generator));
    }
  }
  int64_t written() const {
    return std::count_if(data(), data() + size_,
                         [](T value) { return !std::isnan(anyflash::number(value)); });
  }
  bool operator==(const Tensor& other) const { return memory_ == other.memory_; }

 private:
  T* data() const { return memory_.template as<T>(); }

  int64_t columns_, head_stride_, row_stride_, outer_stride_, size_;
  anyflash::fuzz::Guarded memory_;
};

// Integers that end at memory that nobody may touch.
inline anyflash::fuzz::Guarded guarded(const std::vector<int32_t>& values) {
  anyflash::fuzz::Guarded memory(int64_t(values.size() * sizeof(int32_t)), true);
  std::copy(values.begin(), values.end(), memory.as<int32_t>());
  return memory;
}

template <typename T>
inline constexpr double kError = 1e-6;
template <>
inline constexpr double kError<fp16> = 1.0 / 2048;
template <>
inline constexpr double kError<bf16> = 1.0 / 256;

template <typename T>
class Check {
 public:
  // launch(params) returns 0 for success.
  template <typename Launch>
  Check(const Case& c, Launch launch)
      : c_(c),
        batch_(int64_t(c.lengths.size())),
        pages_(c.table.empty() ? batch_ : batch_ * c.pages_per_sequence + 2),
        table_rows_(c.page_size * c.pages_per_sequence + 3),
        k_(batch_, c.seqlen_new, c.heads_k, c.head_dim, c.gap),
        v_(batch_, c.seqlen_new, c.heads_k, c.head_dim_v, c.gap),
        q_(batch_, c.seqlen_q, c.heads, c.head_dim, c.gap),
        q_rotated_(batch_, c.seqlen_q, c.heads, c.head_dim, c.gap),
        k_cache_(pages_, c.page_size, c.heads_k, c.head_dim, c.gap),
        v_cache_(pages_, c.page_size, c.heads_k, c.head_dim_v, c.gap),
        lengths_(guarded(c.lengths)),
        table_(guarded(c.table)),
        seqused_(c.lengths.size(), -1),
        cos_(1, table_rows_, 1, c.rotary_dim / 2, 1),
        sin_(1, table_rows_, 1, c.rotary_dim / 2, 1) {
    std::mt19937 generator(5);
    for (Tensor<T>* x : {&k_, &v_, &q_, &cos_, &sin_}) x->randomise(generator);
    KvcacheAppendParams p{};
    p.k = k_.rows();
    p.v = v_.rows();
    p.k_cache = k_cache_.rows();
    p.v_cache = v_cache_.rows();
    p.cache_seqlens = lengths_.as<int32_t>();
    p.seqused_k = c.seqused ? seqused_.data() : nullptr;
    p.block_table = c.table.empty() ? nullptr : table_.as<int32_t>();
    p.block_table_stride = p.pages_per_sequence = c.pages_per_sequence;
    p.page_size = c.page_size;
    p.num_pages = pages_;
    p.batch = batch_;
    p.seqlen_new = c.seqlen_new;
    p.heads_k = c.heads_k;
    p.head_dim = c.head_dim;
    p.head_dim_v = c.head_dim_v;
    if (c.rotary_dim > 0) {
      p.rotary_cos = cos_.at(0, 0, 0);
      p.rotary_sin = sin_.at(0, 0, 0);
      p.rotary_cos_stride = p.rotary_sin_stride = c.rotary_dim / 2 + 1;
    }
    p.seqlen_rotary = table_rows_;
    p.rotary_dim = c.rotary_dim;
    p.interleaved = c.interleaved;
    p.q = q_.rows();
    p.q_rotated = q_rotated_.rows();
    p.seqlen_q = c.seqlen_q;
    p.heads = c.heads;
    p.q_positions_move = c.q_positions_move;
    REQUIRE(launch(p) == 0);
  }

  void compare() {
    int64_t k_written = 0, v_written = 0;
    for (int64_t b = 0; b < batch_; ++b) {
      CHECK(seqused_[size_t(b)] == (c_.seqused ? c_.lengths[size_t(b)] + c_.seqlen_new : -1));
      for (int64_t row = 0; row < c_.seqlen_new; ++row) {
        const int64_t position = c_.lengths[b] + row;
        const int64_t page_index = position / c_.page_size;
        if (position < 0 || page_index >= c_.pages_per_sequence) continue;
        const int64_t page =
            c_.table.empty() ? b : c_.table[size_t(b * c_.pages_per_sequence + page_index)];
        if (page < 0 || page >= pages_) continue;
        for (int64_t head = 0; head < c_.heads_k; ++head) {
          compare_turned(k_, b, row, k_cache_, page, position % c_.page_size, head, position);
          CHECK(std::memcmp(v_cache_.at(page, position % c_.page_size, head), v_.at(b, row, head),
                            size_t(c_.head_dim_v) * sizeof(T)) == 0);
          k_written += c_.head_dim;
          v_written += c_.head_dim_v;
        }
      }
      for (int64_t row = 0; row < (c_.rotary_dim > 0 ? c_.seqlen_q : 0); ++row) {
        const int64_t position = c_.lengths[b] + (c_.q_positions_move ? row : 0);
        for (int64_t head = 0; head < c_.heads; ++head) {
          compare_turned(q_, b, row, q_rotated_, b, row, head, position);
        }
      }
    }
    CHECK(worst_ <= kError<T>);
    CHECK(k_cache_.written() == k_written);
    CHECK(v_cache_.written() == v_written);
    CHECK(q_rotated_.written() ==
          (c_.rotary_dim > 0 ? batch_ * c_.seqlen_q * c_.heads * c_.head_dim : 0));
  }

  bool same_bits(const Check& other) const {
    return k_cache_ == other.k_cache_ && v_cache_ == other.v_cache_ &&
           q_rotated_ == other.q_rotated_;
  }

 private:
  void compare_turned(Tensor<T>& x, int64_t x_outer, int64_t x_row, Tensor<T>& y, int64_t y_outer,
                      int64_t y_row, int64_t head, int64_t position) {
    const int64_t half = c_.rotary_dim / 2;
    const int64_t angle = std::min(std::max<int64_t>(position, 0), table_rows_ - 1);
    for (int64_t i = 0; i < c_.head_dim; ++i) {
      const auto x_at = [&](int64_t column) { return x.value(x_outer, x_row, head, column); };
      double expected = x_at(i);
      if (i < c_.rotary_dim) {
        const int64_t pair = c_.interleaved ? i / 2 : i % half;
        const bool second = c_.interleaved ? i % 2 == 1 : i >= half;
        const int64_t distance = c_.interleaved ? 1 : half;
        const double cos = cos_.value(0, angle, 0, pair), sin = sin_.value(0, angle, 0, pair);
        expected = second ? x_at(i - distance) * sin + x_at(i) * cos
                          : x_at(i) * cos - x_at(i + distance) * sin;
      }
      const double error = std::abs(y.value(y_outer, y_row, head, i) - expected);
      if (!(error / (1 + std::abs(expected)) <= worst_)) worst_ = error / (1 + std::abs(expected));
    }
  }

  const Case c_;
  int64_t batch_, pages_, table_rows_;
  Tensor<T> k_, v_, q_, q_rotated_, k_cache_, v_cache_;
  anyflash::fuzz::Guarded lengths_, table_;
  std::vector<int32_t> seqused_;
  Tensor<T> cos_, sin_;
  double worst_ = 0;
};

inline std::vector<Case> cases() {
  std::vector<Case> all;
  for (const int64_t rotary_dim : {0, 2, 16, 30, 32}) {
    for (const bool interleaved : {true, false}) {
      Case c{{5, 0, 20}};
      c.rotary_dim = rotary_dim;
      c.interleaved = interleaved;
      c.seqlen_new = 3;
      c.seqlen_q = 4;
      all.push_back(c);
      c.q_positions_move = false;
      for (const int64_t gap : {5, 8}) {
        c.gap = gap;
        all.push_back(c);
      }
    }
  }
  Case paged{{6, 0, 13}};
  paged.page_size = 7;
  paged.pages_per_sequence = 3;
  paged.table = {3, 1, -1, 0, -1, -1, 9, 7, 4};
  paged.seqlen_new = 4;
  paged.rotary_dim = 32;
  all.push_back(paged);
  paged.page_size = 1;  // most positions have no page
  all.push_back(paged);
  paged.page_size = 7;
  paged.table[7] = 11;  // one more than there are
  all.push_back(paged);
  Case by_index{{9, 2}};
  by_index.table = {3, 1};
  all.push_back(by_index);
  Case odd{{1, 2}};
  odd.head_dim = 59;
  odd.head_dim_v = 13;
  odd.rotary_dim = 58;
  all.push_back(odd);
  odd.interleaved = false;
  all.push_back(odd);
  Case outside{{-2, 23, 1000000, 24}};  // and queries beyond the table
  outside.seqlen_new = 3;
  outside.seqlen_q = 9;
  outside.rotary_dim = 8;
  all.push_back(outside);
  Case large{std::vector<int32_t>(5, 3)};
  large.seqlen_new = large.seqlen_q = 20;
  large.head_dim = large.rotary_dim = 512;
  all.push_back(large);
  Case wide{{3, 0}};  // more columns than a block has threads
  wide.head_dim = wide.head_dim_v = 259;
  wide.seqused = false;
  all.push_back(wide);
  Case none{{}};
  all.push_back(none);
  return all;
}

}  // namespace kvcache_append_cases
