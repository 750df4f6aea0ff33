// A random attention problem: shapes, features and memory layouts from a seed, every buffer between
// guard pages, NaN wherever nothing is to be read or written.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "kernels/arch.h"
#include "kernels/features.h"
#include "tests/cpp/attention_reference.h"
#include "tests/fuzz/guarded.h"

namespace anyflash::fuzz {

enum class Kind { any, forward, decode, backward };

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed * 0x9E3779B97F4A7C15u + 1) {}

  uint64_t bits() { return engine_(); }
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  bool chance(double probability) { return uniform() < probability; }
  int64_t integer(int64_t least, int64_t most) {
    return least + static_cast<int64_t>(engine_() % static_cast<uint64_t>(most - least + 1));
  }
  // Each power of two as likely as the next.
  int64_t log_integer(int64_t least, int64_t most) {
    const double x =
        std::exp(uniform() * std::log((most + 1.0) / least)) * static_cast<double>(least);
    return std::min(most, static_cast<int64_t>(x));
  }
  double normal() {  // near enough: variance 1, at most 3.5
    double sum = 0;
    for (int i = 0; i < 4; ++i) sum += uniform() - 0.5;
    return sum * std::sqrt(3.0);
  }

 private:
  std::mt19937_64 engine_;
};

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : 2; }

inline uint16_t fp16_bits(double x) {
  const double size = std::fabs(x);
  const int sign = std::signbit(x) ? 1 << 15 : 0;
  if (size == reference::kInfinity) return static_cast<uint16_t>(sign | 31 << 10);
  if (size < std::ldexp(1, -14)) {
    return static_cast<uint16_t>(sign | static_cast<int>(std::nearbyint(std::ldexp(size, 24))));
  }
  const int exponent = std::ilogb(size);
  const auto fraction = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent))) - 1024;
  return static_cast<uint16_t>(sign | (((exponent + 15) << 10) + fraction));
}

inline void write(Dtype dtype, void* data, int64_t i, double x) {
  const auto single = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof(bits));
  if (dtype == Dtype::fp32) static_cast<float*>(data)[i] = single;
  if (dtype == Dtype::bf16) {
    static_cast<uint16_t*>(data)[i] =
        static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
  if (dtype == Dtype::fp16) static_cast<uint16_t*>(data)[i] = fp16_bits(x);
}

// All bits set are a NaN in every dtype.
inline void poison(const Guarded& buffer) {
  if (buffer.bytes() > 0) std::memset(buffer.as(), 0xFF, buffer.bytes());
}

// The instances that compute one dtype on one instruction set.
struct Kernels {
  const Instance* forward;
  const Instance* backward;  // may be null

  reference::Arithmetic arithmetic() const {
    const bool pairs = std::string(forward->arch) == "avx512bf16";  // bf16 into products
    return {forward->dtype, pairs ? 1.0 / 256 : 0, pairs ? 3e-6 : 2e-7};
  }
};

// Those that this CPU runs, or with a name those of that instruction set.
inline std::vector<Kernels> kernels_here(const std::string& arch = "") {
  int32_t count = 0;
  const Instance* all = anyflash_instances(&count);
  std::vector<Kernels> found;
  for (const Instance* forward = all; forward < all + count; ++forward) {
    if (forward->family != Family::attention || forward->device != Device::cpu ||
        forward->direction != Direction::forward ||
        !contains(anyflash_cpu_isa(), forward->min_sm) ||
        (!arch.empty() && arch != forward->arch)) {
      continue;
    }
    Kernels kernels{forward, nullptr};
    for (const Instance* other = all; other < all + count; ++other) {
      if (other->family == Family::attention && other->direction == Direction::backward &&
          other->dtype == forward->dtype && std::string(other->arch) == forward->arch) {
        kernels.backward = other;
      }
    }
    found.push_back(kernels);
  }
  return found;
}

// The memory of one call's results.
struct Results {
  Guarded out, lse, dq, dk, dv, dbias, dsinks;

  bool operator==(const Results& other) const {
    return out == other.out && lse == other.lse && dq == other.dq && dk == other.dk &&
           dv == other.dv && dbias == other.dbias && dsinks == other.dsinks;
  }
};

class Problem {
 public:
  Problem(uint64_t seed, Kind kind, const Kernels& kernels)
      : kernels_(kernels), dtype_(kernels.forward->dtype), random_(seed) {
    choose_sizes(kind);
    choose_lengths();
    choose_features();
    choose_layouts();
    fill_queries();
    fill_keys();
    if (p_.bias_type != BiasType::none) fill_bias();
  }

  const AttentionParams& params() const { return p_; }
  bool backward_runs() const { return backward_; }

  Features features() const {
    Features found = 0;
    const auto when = [&](bool condition, Features feature) { found |= condition ? feature : 0; };
    when(p_.cu_seqlens_q, Feature::packed);
    when(p_.block_table, Feature::paged);
    when(p_.seqused_k, Feature::seqused_k);
    when(p_.leftpad_k, Feature::leftpad_k);
    when(p_.window_left < 0 && p_.window_right == 0, Feature::causal);
    when(p_.window_left >= 0 || p_.window_right > 0, Feature::window);
    when(p_.softcap > 0, Feature::softcap);
    when(p_.alibi_slopes, Feature::alibi);
    when(p_.bias, Feature::bias);
    when(dbias_size_ > 0, Feature::bias_grad);
    when(p_.sinks, Feature::sinks);
    when(p_.dropout_p > 0, Feature::dropout);
    when(p_.heads != p_.heads_k, Feature::gqa);
    when(p_.head_dim != p_.head_dim_v, Feature::unequal_head_dims);
    when(backward_ && p_.dlse.data, Feature::lse_grad);
    return found;
  }

  // Runs the kernels into fresh memory; the backward uses the forward's own out and lse.
  int32_t run(const CpuThreads* threads, Results& results) {
    results.out = allocate(out_size_ * bytes_of(dtype_));
    results.lse = allocate(lse_size_ * 4);
    AttentionParams p = with(results);
    int32_t error = anyflash_launch(kernels_.forward, &p, const_cast<CpuThreads*>(threads));
    results.out.make_read_only();
    results.lse.make_read_only();
    if (error != 0 || !backward_) return error;
    results.dq = allocate(dq_size_ * bytes_of(dtype_));
    results.dk = allocate(dk_size_ * bytes_of(dtype_));
    results.dv = allocate(dv_size_ * bytes_of(dtype_));
    if (dbias_size_ > 0) {
      results.dbias = allocate(dbias_size_ * 4);
      std::memset(results.dbias.as(), 0, results.dbias.bytes());
    }
    if (wants_dsinks_) results.dsinks = allocate(p_.heads * 4);
    p = with(results);
    return anyflash_launch(kernels_.backward, &p, const_cast<CpuThreads*>(threads));
  }

  // What the results should be; `judged` is params(), or something else to see that it is noticed.
  // Returns what differs, or nothing. `worst` is raised to the largest error in units of its bound.
  std::string check(const Results& results, AttentionParams judged, double* worst) const {
    using reference::Values;
    const reference::Arithmetic arithmetic = kernels_.arithmetic();
    attach(results, judged);
    Values out(out_size_), lse(lse_size_);
    reference::forward(judged, arithmetic, out, lse);
    std::string wrong = compare("out", dtype_, results.out, out, worst);
    wrong += compare("lse", Dtype::fp32, results.lse, lse, worst);
    if (!backward_) return wrong;
    Values dq(dq_size_), dk(dk_size_), dv(dv_size_), dbias(dbias_size_);
    Values dsinks(wants_dsinks_ ? p_.heads : 0);
    reference::backward(judged, arithmetic, dq, dk, dv, results.dbias ? &dbias : nullptr,
                        wants_dsinks_ ? &dsinks : nullptr);
    wrong += compare("dq", dtype_, results.dq, dq, worst);
    wrong += compare("dk", dtype_, results.dk, dk, worst);
    wrong += compare("dv", dtype_, results.dv, dv, worst);
    wrong += compare("dbias", Dtype::fp32, results.dbias, dbias, worst);
    wrong += compare("dsinks", Dtype::fp32, results.dsinks, dsinks, worst);
    return wrong;
  }

  std::string describe() const {
    char text[300];
    std::snprintf(text, sizeof(text),
                  "%s batch %ld heads %ld/%ld seqlen_q %ld seqlen_k %ld head_dim %ld/%ld window "
                  "%ld,%ld scale %.3g",
                  kernels_.forward->name, long(p_.batch), long(p_.heads), long(p_.heads_k),
                  long(longest_q_), long(longest_k_), long(p_.head_dim), long(p_.head_dim_v),
                  long(p_.window_left), long(p_.window_right), double(p_.softmax_scale));
    std::string all = text;
    const Features here = features();
    for (uint32_t i = 0; i < feature_number::count; ++i) {
      if (here >> i & 1) all += std::string(" ") + kFeatureTexts[i].name;
    }
    return all;
  }

 private:
  Guarded allocate(int64_t bytes) {
    Guarded buffer(bytes, flush_with_end_);
    poison(buffer);
    return buffer;
  }

  // Memory that the kernels only read, kept as long as the problem.
  template <class T>
  T* keep(const std::vector<T>& values) {
    Guarded buffer(static_cast<int64_t>(values.size() * sizeof(T)), random_.chance(0.5));
    if (!values.empty()) std::memcpy(buffer.as(), values.data(), buffer.bytes());
    buffer.make_read_only();
    inputs_.push_back(std::move(buffer));
    return inputs_.back().as<T>();
  }

  int64_t head_dim() {
    static constexpr int64_t kUsual[] = {16, 32, 64, 96, 128};
    if (random_.chance(0.3)) return kUsual[random_.integer(0, 4)];
    return random_.log_integer(1, 512);
  }

  void choose_sizes(Kind kind) {
    if (kind == Kind::any && random_.chance(0.2)) kind = Kind::decode;
    const bool decode = kind == Kind::decode;
    flush_with_end_ = random_.chance(0.5);
    p_.batch = random_.chance(0.02) ? 0 : random_.log_integer(1, 4);
    p_.heads_k = random_.log_integer(1, 4);
    p_.heads = p_.heads_k * (random_.chance(0.5) ? 1 : random_.log_integer(1, 8));
    p_.head_dim = head_dim();
    p_.head_dim_v = random_.chance(0.6) ? p_.head_dim : head_dim();
    longest_q_ =
        decode ? random_.integer(1, 16) : random_.log_integer(1, random_.chance(0.1) ? 1200 : 300);
    longest_k_ = random_.log_integer(1, decode || random_.chance(0.2) ? 2000 : 300);
    if (!decode && random_.chance(0.4)) longest_k_ = longest_q_;
    // The reference multiplies one number after the other.
    const auto work = [&] {
      return p_.batch * p_.heads * longest_q_ * longest_k_ * (p_.head_dim + p_.head_dim_v);
    };
    while (work() > 4'000'000) {
      if (p_.batch > 2) {
        p_.batch /= 2;
      } else if (p_.heads > 4) {
        p_.heads_k = std::max<int64_t>(1, p_.heads_k / 2);
        p_.heads = std::max<int64_t>(p_.heads_k, p_.heads / 2 / p_.heads_k * p_.heads_k);
      } else if (p_.head_dim + p_.head_dim_v > 300) {
        p_.head_dim = (p_.head_dim + 1) / 2;
        p_.head_dim_v = (p_.head_dim_v + 1) / 2;
      } else if (!decode && longest_q_ > 40) {
        longest_q_ = longest_q_ * 2 / 3;
      } else {
        longest_k_ = longest_k_ * 2 / 3;
      }
    }
    if (random_.chance(0.01)) longest_q_ = 0;
    if (random_.chance(0.02)) longest_k_ = 0;
    packed_q_ = random_.chance(0.4);
    paged_ = kind != Kind::backward && random_.chance(decode ? 0.4 : 0.1);
    packed_k_ = packed_q_ && !paged_;
    backward_ = kernels_.backward && !paged_ && kind != Kind::forward &&
                (!decode || random_.chance(0.3)) &&
                random_.chance(kind == Kind::backward ? 1 : 0.7);
  }

  // A length up to `longest`, and where sequences follow each other, their beginnings.
  int64_t length(int64_t longest) {
    if (random_.chance(0.15)) return 0;
    return random_.chance(0.3) || longest == 0 ? longest : random_.integer(1, longest);
  }
  std::vector<int32_t> cumulative(int64_t longest) {
    std::vector<int32_t> begin{0};
    for (int64_t b = 0; b < p_.batch; ++b) {
      begin.push_back(begin.back() + static_cast<int32_t>(length(longest)));
    }
    return begin;
  }

  void choose_lengths() {
    rows_q_ = longest_q_;
    rows_k_ = longest_k_;
    p_.seqlen_q = longest_q_;
    p_.seqlen_k = longest_k_;
    if (packed_q_) {
      const std::vector<int32_t> begin = cumulative(longest_q_);
      rows_q_ = begin.back() + random_.integer(0, 3);  // slack behind the last sequence
      p_.cu_seqlens_q = keep(begin);
    }
    std::vector<int32_t> stored(p_.batch, static_cast<int32_t>(longest_k_));
    if (packed_k_) {
      const std::vector<int32_t> begin = cumulative(longest_k_);
      for (int64_t b = 0; b < p_.batch; ++b) stored[b] = begin[b + 1] - begin[b];
      rows_k_ = begin.back() + random_.integer(0, 3);
      p_.cu_seqlens_k = keep(begin);
    }
    used_ = stored;
    first_.assign(p_.batch, 0);
    if (paged_ || random_.chance(0.25)) {
      for (int64_t b = 0; b < p_.batch; ++b) used_[b] = static_cast<int32_t>(length(stored[b]));
      p_.seqused_k = keep(used_);
    }
    if (random_.chance(0.2)) {
      for (int64_t b = 0; b < p_.batch; ++b) {
        first_[b] = static_cast<int32_t>(random_.integer(0, std::min(used_[b], 40)));
      }
      p_.leftpad_k = keep(first_);
    }
    if (paged_) choose_pages();
  }

  void choose_pages() {
    p_.page_size = random_.log_integer(1, 256);
    const int64_t per_sequence = (longest_k_ + p_.page_size - 1) / p_.page_size;
    p_.seqlen_k = per_sequence * p_.page_size;
    p_.block_table_stride = per_sequence + random_.integer(0, 2);
    pages_ = p_.batch * per_sequence + 1;
    std::vector<int32_t> order(pages_);
    for (int64_t i = 0; i < pages_; ++i) order[i] = static_cast<int32_t>(i);
    for (int64_t i = pages_ - 1; i > 0; --i) std::swap(order[i], order[random_.integer(0, i)]);
    // Numbers of no page where no key is.
    std::vector<int32_t> table(p_.batch * p_.block_table_stride, -0x7000000);
    for (int64_t b = 0; b < p_.batch; ++b) {
      for (int64_t page = 0; page * p_.page_size < used_[b]; ++page) {
        if ((page + 1) * p_.page_size <= first_[b]) continue;
        table[b * p_.block_table_stride + page] = order[b * per_sequence + page];
      }
    }
    p_.block_table = keep(table);
  }

  std::vector<float> floats(int64_t count, double least, double most) {
    std::vector<float> values(count);
    for (float& x : values) x = static_cast<float>(least + (most - least) * random_.uniform());
    return values;
  }

  void choose_features() {
    const double usual = 1 / std::sqrt(static_cast<double>(p_.head_dim));
    p_.softmax_scale = static_cast<float>(usual * std::exp(2 * random_.uniform() - 1));
    if (random_.chance(0.03)) p_.softmax_scale = random_.chance(0.5) ? 0 : -p_.softmax_scale;
    p_.window_left = p_.window_right = -1;
    const auto width = [&] { return random_.chance(0.3) ? 0 : random_.log_integer(1, 300); };
    if (random_.chance(0.5)) p_.window_right = random_.chance(0.7) ? 0 : width();
    if (random_.chance(0.25)) p_.window_left = width();
    if (random_.chance(0.2)) p_.softcap = static_cast<float>(std::exp(4 * random_.uniform() - 1));
    if (random_.chance(0.2)) {
      p_.alibi_batch_stride = random_.chance(0.5) ? 0 : p_.heads + random_.integer(0, 2);
      const int64_t size = p_.alibi_batch_stride * std::max<int64_t>(p_.batch - 1, 0) + p_.heads;
      p_.alibi_slopes = keep(floats(size, 0, 0.3));
    }
    if (random_.chance(0.25)) {
      p_.sinks = keep(floats(p_.heads, -2, 3));
      wants_dsinks_ = backward_ && random_.chance(0.8);
    }
    if (random_.chance(0.2)) {
      p_.dropout_p =
          random_.chance(0.1) && dtype_ != Dtype::fp16 ? 0.99999 : 0.05 + 0.85 * random_.uniform();
      p_.seed = random_.bits();
      p_.offset = static_cast<uint32_t>(random_.bits());
    }
    if (random_.chance(0.25)) {
      static constexpr BiasType kTypes[] = {BiasType::fp16, BiasType::bf16, BiasType::fp32,
                                            BiasType::boolean};
      p_.bias_type = kTypes[random_.integer(0, 3)];
    }
  }

  // Heads inside of rows or rows inside of heads, with gaps or without. Returns the elements from
  // the first to the last.
  int64_t lay_out(Rows& x, int64_t entries, int64_t rows, int64_t heads, int64_t columns,
                  bool may_broadcast) {
    const auto gap = [&] { return random_.chance(0.7) ? 0 : random_.integer(1, 9); };
    if (random_.chance(0.6)) {
      x.head_stride = columns + gap();
      x.row_stride = heads * x.head_stride + gap();
      x.batch_stride = rows * x.row_stride + gap();
    } else {
      x.row_stride = columns + gap();
      x.head_stride = rows * x.row_stride + gap();
      x.batch_stride = heads * x.head_stride + gap();
    }
    if (may_broadcast && random_.chance(0.05)) x.head_stride = 0;
    if (entries == 0 || rows == 0 || heads == 0) return 0;
    return (entries - 1) * x.batch_stride + (rows - 1) * x.row_stride +
           (heads - 1) * x.head_stride + columns;
  }

  int64_t lay_out(RowStatistics& x) {
    const int64_t entries = packed_q_ ? 1 : p_.batch;
    x.head_stride = rows_q_ + (random_.chance(0.7) ? 0 : random_.integer(1, 9));
    x.batch_stride = p_.heads * x.head_stride + (random_.chance(0.7) ? 0 : random_.integer(1, 9));
    if (entries == 0 || rows_q_ == 0) return 0;
    return (entries - 1) * x.batch_stride + (p_.heads - 1) * x.head_stride + rows_q_;
  }

  void choose_layouts() {
    const int64_t entries_q = packed_q_ ? 1 : p_.batch;
    const int64_t entries_k = paged_ ? pages_ : packed_k_ ? 1 : p_.batch;
    if (paged_) rows_k_ = p_.page_size;
    q_size_ = lay_out(p_.q, entries_q, rows_q_, p_.heads, p_.head_dim, true);
    k_size_ = lay_out(p_.k, entries_k, rows_k_, p_.heads_k, p_.head_dim, true);
    v_size_ = lay_out(p_.v, entries_k, rows_k_, p_.heads_k, p_.head_dim_v, true);
    out_size_ = lay_out(p_.out, entries_q, rows_q_, p_.heads, p_.head_dim_v, false);
    lse_size_ = lay_out(p_.lse);
    dout_size_ = lay_out(p_.dout, entries_q, rows_q_, p_.heads, p_.head_dim_v, true);
    dlse_size_ = lay_out(p_.dlse);
    dq_size_ = lay_out(p_.dq, entries_q, rows_q_, p_.heads, p_.head_dim, false);
    dk_size_ = lay_out(p_.dk, entries_k, rows_k_, p_.heads_k, p_.head_dim, false);
    dv_size_ = lay_out(p_.dv, entries_k, rows_k_, p_.heads_k, p_.head_dim_v, false);
  }

  void fill_queries() {
    Guarded q = allocate(q_size_ * bytes_of(dtype_)),
            dout = allocate(dout_size_ * bytes_of(dtype_));
    Guarded dlse = allocate(dlse_size_ * 4);
    for (int64_t b = 0; b < p_.batch; ++b) {
      const reference::Sequence s(p_, b);
      for (int64_t head = 0; head < p_.heads; ++head) {
        for (int64_t i = 0; i < s.seqlen_q; ++i) {
          fill_row(q, s.query_position(p_.q, i, head), p_.head_dim);
          fill_row(dout, s.query_position(p_.dout, i, head), p_.head_dim_v);
          dlse.as<float>()[s.statistic_position(p_.dlse, i, head)] =
              static_cast<float>(random_.normal());
        }
      }
    }
    p_.q.data = add_input(std::move(q));
    p_.dout.data = add_input(std::move(dout));
    void* data = add_input(std::move(dlse));
    if (random_.chance(0.4)) p_.dlse.data = static_cast<float*>(data);
  }

  void fill_keys() {
    Guarded k = allocate(k_size_ * bytes_of(dtype_)), v = allocate(v_size_ * bytes_of(dtype_));
    for (int64_t b = 0; b < p_.batch; ++b) {
      const reference::Sequence s(p_, b);
      for (int64_t head = 0; head < p_.heads_k; ++head) {
        for (int64_t j = 0; j < s.seqlen_k; ++j) {
          fill_row(k, s.key_position(p_.k, j, head), p_.head_dim);
          fill_row(v, s.key_position(p_.v, j, head), p_.head_dim_v);
        }
      }
    }
    p_.k.data = add_input(std::move(k));
    p_.v.data = add_input(std::move(v));
  }

  void fill_row(const Guarded& buffer, int64_t at, int64_t columns) {
    for (int64_t c = 0; c < columns; ++c) write(dtype_, buffer.as(), at + c, random_.normal());
  }

  void* add_input(Guarded buffer) {
    buffer.make_read_only();
    inputs_.push_back(std::move(buffer));
    return inputs_.back().as();
  }

  void fill_bias() {
    int64_t shape[4] = {p_.batch, p_.heads, longest_q_, longest_k_};
    for (int64_t& size : shape) {
      if (size > 0 && random_.chance(0.3)) size = 1;
    }
    int64_t order[4] = {0, 1, 2, 3};
    if (random_.chance(0.2)) std::swap(order[2], order[3]);
    int64_t stride = random_.chance(0.9) ? 1 : 2, contiguous = 1;
    int64_t whole[4], own[4];
    for (int i = 3; i >= 0; --i) {
      whole[order[i]] = stride;
      stride = stride * shape[order[i]] + (random_.chance(0.7) ? 0 : random_.integer(1, 5));
      own[i] = contiguous;
      contiguous *= shape[i];
    }
    int64_t size = contiguous > 0 ? 1 : 0;
    for (int i = 0; i < 4; ++i) {
      p_.bias_stride[i] = shape[i] == 1 ? 0 : whole[i];
      p_.dbias_stride[i] = shape[i] == 1 ? 0 : own[i];
      if (size > 0) size += (shape[i] - 1) * p_.bias_stride[i];
    }
    const bool boolean = p_.bias_type == BiasType::boolean;
    const Dtype dtype = p_.bias_type == BiasType::fp32   ? Dtype::fp32
                        : p_.bias_type == BiasType::bf16 ? Dtype::bf16
                                                         : Dtype::fp16;
    Guarded bias = allocate(size * (boolean ? 1 : bytes_of(dtype)));
    const double hidden = random_.chance(0.3) ? 0.9 : random_.chance(0.5) ? 0.2 : 0;
    // NaN stays wherever no row of any sequence looks.
    for (int64_t b = 0; b < p_.batch; ++b) {
      const reference::Sequence s(p_, b);
      for (int64_t head = 0; head < p_.heads; ++head) {
        for (int64_t i = 0; i < s.seqlen_q; ++i) {
          for (int64_t j = 0; j < s.seqlen_k; ++j) {
            if (!s.visible(i, j)) continue;
            const int64_t at = b * p_.bias_stride[0] + head * p_.bias_stride[1] +
                               i * p_.bias_stride[2] + j * p_.bias_stride[3];
            const bool hide = random_.chance(hidden);
            if (boolean) {
              bias.as<uint8_t>()[at] = !hide;
            } else {
              write(dtype, bias.as(), at, hide ? -reference::kInfinity : random_.normal());
            }
          }
        }
      }
    }
    p_.bias = add_input(std::move(bias));
    if (!boolean && backward_ && random_.chance(0.7)) dbias_size_ = contiguous;
  }

  void attach(const Results& results, AttentionParams& p) const {
    p.out.data = results.out.as();
    p.lse.data = results.lse.as<float>();
    p.dq.data = results.dq.as();
    p.dk.data = results.dk.as();
    p.dv.data = results.dv.as();
    p.dbias = results.dbias.as<float>();
    p.dsinks = results.dsinks.as<float>();
  }
  AttentionParams with(const Results& results) const {
    AttentionParams p = p_;
    attach(results, p);
    return p;
  }

  // What is not written must still be poison, bit for bit.
  static std::string compare(const char* what, Dtype dtype, const Guarded& found,
                             const reference::Values& expected, double* worst) {
    const int64_t bytes = bytes_of(dtype);
    std::string first;
    int64_t wrong = 0;
    for (int64_t i = 0; i < static_cast<int64_t>(expected.value.size()); ++i) {
      char text[200];
      if (!expected.written(i)) {
        const unsigned char* at = found.as<unsigned char>() + i * bytes;
        if (std::all_of(at, at + bytes, [](unsigned char x) { return x == 0xFF; })) continue;
        std::snprintf(text, sizeof(text), "%s[%ld] was written; ", what, long(i));
      } else {
        const double x = reference::read(dtype, found.as(), i);
        const double error = x == expected.value[i] ? 0 : std::fabs(x - expected.value[i]);
        if (error <= expected.bound[i]) {
          if (error > 0) *worst = std::max(*worst, error / expected.bound[i]);
          continue;
        }
        std::snprintf(text, sizeof(text), "%s[%ld] = %.9g, expected %.9g +- %.2g; ", what, long(i),
                      x, expected.value[i], expected.bound[i]);
      }
      if (wrong++ == 0) first = text;
    }
    if (wrong > 1) {
      first += "(" + std::to_string(wrong) + " of " + std::to_string(expected.value.size()) + ") ";
    }
    return first;
  }

  Kernels kernels_;
  Dtype dtype_;
  Random random_;
  AttentionParams p_{};
  std::vector<Guarded> inputs_;

  bool flush_with_end_ = false, packed_q_ = false, packed_k_ = false, paged_ = false;
  bool backward_ = false, wants_dsinks_ = false;
  int64_t longest_q_ = 0, longest_k_ = 0, pages_ = 0;
  int64_t rows_q_ = 0, rows_k_ = 0;    // stored, per batch entry, page or in all
  std::vector<int32_t> first_, used_;  // stored keys of each sequence that are visible
  int64_t q_size_ = 0, k_size_ = 0, v_size_ = 0, out_size_ = 0, lse_size_ = 0, dout_size_ = 0;
  int64_t dlse_size_ = 0, dq_size_ = 0, dk_size_ = 0, dv_size_ = 0, dbias_size_ = 0;
};

}  // namespace anyflash::fuzz
