// An attention problem in memory: the tensors of a Shape, every buffer between guard pages, NaN
// wherever nothing is to be read or written.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "kernels/features.h"
#include "tests/cpp/attention_reference.h"
#include "tests/fuzz/compare.h"
#include "tests/fuzz/guarded.h"
#include "tests/fuzz/numbers.h"
#include "tests/fuzz/random.h"
#include "tests/fuzz/shape.h"

namespace anyflash::fuzz {

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
  Problem(const Shape& shape, Dtype dtype, uint64_t seed)
      : shape_(shape), dtype_(dtype), random_(seed) {
    flush_with_end_ = random_.chance(0.5);
    set_sizes();
    set_lengths();
    set_features();
    lay_out_all();
    fill_queries();
    fill_keys();
    if (shape_.bias_type != BiasType::none) fill_bias();
    for (Guarded& buffer : inputs_) buffer.make_read_only();
  }

  const Shape& shape() const { return shape_; }
  const AttentionParams& params() const { return p_; }
  const std::vector<Guarded>& inputs() const { return inputs_; }

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
    when(p_.dlse.data, Feature::lse_grad);
    return found;
  }

  // Fresh memory for what a forward writes.
  Results forward_results() const {
    Results results;
    results.out = allocate(out_size_ * bytes_of(dtype_));
    results.lse = allocate(lse_size_ * 4);
    return results;
  }
  // The reference's, rounded: what a backward is given.
  void fill_forward_results(Results& results, const reference::Arithmetic& arithmetic) const {
    reference::Values out(out_size_), lse(lse_size_);
    reference::forward(with(results), arithmetic, out, lse);
    for (int64_t i = 0; i < out_size_; ++i) {
      if (out.written(i)) write(dtype_, results.out.as(), i, out.value[i]);
    }
    for (int64_t i = 0; i < lse_size_; ++i) {
      if (lse.written(i)) write(Dtype::fp32, results.lse.as(), i, lse.value[i]);
    }
  }
  void add_backward_results(Results& results) const {
    results.dq = allocate(dq_size_ * bytes_of(dtype_));
    results.dk = allocate(dk_size_ * bytes_of(dtype_));
    results.dv = allocate(dv_size_ * bytes_of(dtype_));
    if (dbias_size_ > 0) {
      results.dbias = allocate(dbias_size_ * 4);
      std::memset(results.dbias.as(), 0, results.dbias.bytes());
    }
    if (shape_.dsinks) results.dsinks = allocate(p_.heads * 4);
  }

  AttentionParams with(const Results& results) const {
    AttentionParams p = p_;
    attach(results, p);
    return p;
  }

  // What the results should be; `judged` is params(), or something else to see that it is noticed.
  // Returns what differs, or nothing. `worst` is raised to the largest error in units of its bound.
  std::string check(const Results& results, AttentionParams judged,
                    const reference::Arithmetic& arithmetic, double* worst) const {
    using reference::Values;
    attach(results, judged);
    Values out(out_size_), lse(lse_size_);
    reference::forward(judged, arithmetic, out, lse);
    std::string wrong = compare("out", dtype_, results.out, out, worst);
    wrong += compare("lse", Dtype::fp32, results.lse, lse, worst);
    if (!shape_.backward) return wrong;
    Values dq(dq_size_), dk(dk_size_), dv(dv_size_), dbias(dbias_size_);
    Values dsinks(shape_.dsinks ? p_.heads : 0);
    reference::backward(judged, arithmetic, dq, dk, dv, results.dbias ? &dbias : nullptr,
                        shape_.dsinks ? &dsinks : nullptr);
    wrong += compare("dq", dtype_, results.dq, dq, worst);
    wrong += compare("dk", dtype_, results.dk, dk, worst);
    wrong += compare("dv", dtype_, results.dv, dv, worst);
    wrong += compare("dbias", Dtype::fp32, results.dbias, dbias, worst);
    wrong += compare("dsinks", Dtype::fp32, results.dsinks, dsinks, worst);
    return wrong;
  }

  // Whether a number of dbias is a sum.
  bool adds_to_dbias() const { return dbias_size_ > 0 && bias_broadcasts_; }

  std::string describe() const {
    char text[300];
    std::snprintf(text, sizeof(text),
                  "batch %ld heads %ld/%ld seqlen_q %ld seqlen_k %ld head_dim %ld/%ld window "
                  "%ld,%ld scale %.3g",
                  long(p_.batch), long(p_.heads), long(p_.heads_k), long(shape_.seqlen_q),
                  long(shape_.seqlen_k), long(p_.head_dim), long(p_.head_dim_v),
                  long(p_.window_left), long(p_.window_right), double(p_.softmax_scale));
    std::string all = text;
    const Features here = features();
    for (uint32_t i = 0; i < feature_number::count; ++i) {
      if (here >> i & 1) all += std::string(" ") + kFeatureTexts[i].name;
    }
    return all;
  }

 private:
  Guarded allocate(int64_t bytes) const {
    Guarded buffer(bytes, flush_with_end_);
    poison(buffer);
    return buffer;
  }

  // Memory that the kernels only read, kept as long as the problem.
  void* add_input(Guarded buffer) {
    inputs_.push_back(std::move(buffer));
    return inputs_.back().as();
  }
  template <class T>
  T* keep(const std::vector<T>& values) {
    Guarded buffer(static_cast<int64_t>(values.size() * sizeof(T)), random_.chance(0.5));
    if (!values.empty()) std::memcpy(buffer.as(), values.data(), buffer.bytes());
    return static_cast<T*>(add_input(std::move(buffer)));
  }

  void set_sizes() {
    p_.batch = shape_.batch;
    p_.heads = shape_.heads;
    p_.heads_k = shape_.heads_k;
    p_.head_dim = shape_.head_dim;
    p_.head_dim_v = shape_.head_dim_v;
    p_.seqlen_q = rows_q_ = shape_.seqlen_q;
    p_.seqlen_k = rows_k_ = shape_.seqlen_k;
  }

  static Lengths cumulative(const Lengths& lengths, int32_t first) {
    Lengths begin{first};
    for (const int32_t length : lengths) begin.push_back(begin.back() + length);
    return begin;
  }

  void set_lengths() {
    used_.assign(p_.batch, static_cast<int32_t>(shape_.seqlen_k));
    first_.assign(p_.batch, 0);
    if (shape_.packed_q) {
      const Lengths begin = cumulative(*shape_.packed_q, 0);
      rows_q_ = begin.back() + shape_.slack;
      p_.total_q = shape_.clears_rest ? rows_q_ : begin.back();
      p_.cu_seqlens_q = keep(begin);
    }
    if (shape_.packed_k) {
      // With seqused_k the first sequence may begin anywhere.
      const Lengths begin = cumulative(
          *shape_.packed_k, shape_.seqused_k ? static_cast<int32_t>(random_.integer(0, 300)) : 0);
      rows_k_ = begin.back() + shape_.slack;
      p_.total_k = shape_.clears_rest ? rows_k_ : begin.back();
      p_.cu_seqlens_k = keep(begin);
      used_ = *shape_.packed_k;
    }
    if (shape_.held_k) {  // where the lengths begin does not count
      used_ = *shape_.held_k;
      p_.cu_seqlens_k = keep(cumulative(used_, static_cast<int32_t>(random_.integer(0, 99))));
    }
    if (shape_.seqused_k) p_.seqused_k = keep(used_ = *shape_.seqused_k);
    if (shape_.leftpad_k) p_.leftpad_k = keep(first_ = *shape_.leftpad_k);
    if (shape_.page_size > 0) set_pages();
  }

  void set_pages() {
    const int64_t per_sequence = shape_.pages_per_sequence();
    p_.page_size = rows_k_ = shape_.page_size;
    p_.seqlen_k = per_sequence * p_.page_size;
    p_.block_table_stride = per_sequence;
    if (shape_.strides == Strides::random) p_.block_table_stride += random_.integer(0, 2);
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

  void set_features() {
    p_.softmax_scale =
        shape_.softmax_scale.value_or(1 / std::sqrt(static_cast<double>(p_.head_dim)));
    p_.window_left = shape_.window_left;
    p_.window_right = shape_.window_right;
    p_.softcap = shape_.softcap;
    if (shape_.alibi != Slopes::none) {
      if (shape_.alibi == Slopes::batch_heads) {
        p_.alibi_batch_stride = p_.heads + random_.integer(0, 2);
      }
      const int64_t size = p_.alibi_batch_stride * std::max<int64_t>(p_.batch - 1, 0) + p_.heads;
      p_.alibi_slopes = keep(floats(size, 0, 0.3));
    }
    if (shape_.sinks) {
      p_.sinks = keep(floats(p_.heads, -2 * shape_.sink_size, 3 * shape_.sink_size));
    }
    p_.dropout_p = shape_.dropout_p;
    if (p_.dropout_p > 0) {
      p_.rng_state = keep(std::vector<int64_t>{random_.signed_bits(), random_.signed_bits()});
    }
    p_.bias_type = shape_.bias_type;
  }

  int64_t gap() {
    if (shape_.strides != Strides::random || random_.chance(0.7)) return 0;
    return random_.integer(1, 9) * shape_.alignment;
  }

  // Returns the elements from the first to the last.
  int64_t lay_out(Rows& x, int64_t entries, int64_t rows, int64_t heads, int64_t columns) {
    const bool transposed = shape_.strides == Strides::random
                                ? random_.chance(0.4)
                                : shape_.strides == Strides::transposed;
    if (transposed) {  // rows inside of heads
      x.row_stride = columns + gap();
      x.head_stride = rows * x.row_stride + gap();
      x.batch_stride = heads * x.head_stride + gap();
    } else {
      x.head_stride = columns + gap();
      x.row_stride = heads * x.head_stride + gap();
      x.batch_stride = rows * x.row_stride + gap();
    }
    return extent(x, entries, rows, heads, columns);
  }
  // The same for an input, whose heads may all be one.
  int64_t lay_out_input(Rows& x, int64_t entries, int64_t rows, int64_t heads, int64_t columns) {
    lay_out(x, entries, rows, heads, columns);
    if (shape_.strides == Strides::random && random_.chance(0.05)) x.head_stride = 0;
    return extent(x, entries, rows, heads, columns);
  }
  static int64_t extent(const Rows& x, int64_t entries, int64_t rows, int64_t heads,
                        int64_t columns) {
    if (entries == 0 || rows == 0 || heads == 0) return 0;
    return (entries - 1) * x.batch_stride + (rows - 1) * x.row_stride +
           (heads - 1) * x.head_stride + columns;
  }

  int64_t lay_out(RowStatistics& x) {
    const int64_t entries = p_.cu_seqlens_q ? 1 : p_.batch;
    const auto some = [&] {
      return shape_.strides != Strides::random || random_.chance(0.7) ? 0 : random_.integer(1, 9);
    };
    x.head_stride = rows_q_ + some();
    x.batch_stride = p_.heads * x.head_stride + some();
    if (entries == 0 || rows_q_ == 0) return 0;
    return (entries - 1) * x.batch_stride + (p_.heads - 1) * x.head_stride + rows_q_;
  }

  void lay_out_all() {
    const int64_t entries_q = shape_.packed_q ? 1 : p_.batch;
    const int64_t entries_k = p_.block_table ? pages_ : shape_.packed_k ? 1 : p_.batch;
    if (shape_.strides == Strides::fused) {
      lay_out_fused(entries_q);
    } else {
      p_.q.data = input(lay_out_input(p_.q, entries_q, rows_q_, p_.heads, p_.head_dim));
      p_.k.data = input(lay_out_input(p_.k, entries_k, rows_k_, p_.heads_k, p_.head_dim));
      p_.v.data = input(lay_out_input(p_.v, entries_k, rows_k_, p_.heads_k, p_.head_dim_v));
    }
    if (shape_.strides == Strides::broadcast) p_.k.head_stride = p_.v.head_stride = 0;
    out_size_ = lay_out(p_.out, entries_q, rows_q_, p_.heads, p_.head_dim_v);
    lse_size_ = lay_out(p_.lse);
    if (!shape_.backward) return;
    p_.dout.data = input(lay_out_input(p_.dout, entries_q, rows_q_, p_.heads, p_.head_dim_v));
    if (shape_.dlse) p_.dlse.data = static_cast<float*>(add_input(allocate(lay_out(p_.dlse) * 4)));
    dq_size_ = lay_out(p_.dq, entries_q, rows_q_, p_.heads, p_.head_dim);
    dk_size_ = lay_out(p_.dk, entries_k, rows_k_, p_.heads_k, p_.head_dim);
    dv_size_ = lay_out(p_.dv, entries_k, rows_k_, p_.heads_k, p_.head_dim_v);
  }

  void lay_out_fused(int64_t entries) {
    const int64_t heads = p_.heads + 2 * p_.heads_k;
    auto* data = static_cast<char*>(input(lay_out(p_.q, entries, rows_q_, heads, p_.head_dim)));
    p_.k = p_.v = p_.q;
    const int64_t head = p_.q.head_stride * bytes_of(dtype_);
    p_.q.data = data;
    p_.k.data = data + p_.heads * head;
    p_.v.data = data + (p_.heads + p_.heads_k) * head;
  }

  void* input(int64_t elements) { return add_input(allocate(elements * bytes_of(dtype_))); }

  void fill_queries() {
    for (int64_t b = 0; b < p_.batch; ++b) {
      const reference::Sequence s(p_, b);
      for (int64_t head = 0; head < p_.heads; ++head) {
        for (int64_t i = 0; i < s.seqlen_q; ++i) {
          fill_row(p_.q, s.query_position(p_.q, i, head), p_.head_dim, shape_.amplitude);
          if (!shape_.backward) continue;
          fill_row(p_.dout, s.query_position(p_.dout, i, head), p_.head_dim_v, 1);
          bool sees_a_key = false;
          for (int64_t j = 0; j < s.seqlen_k; ++j) sees_a_key |= s.visible(i, j);
          if (shape_.dlse && sees_a_key) {  // else NaN stays
            p_.dlse.data[s.statistic_position(p_.dlse, i, head)] =
                static_cast<float>(random_.normal());
          }
        }
      }
    }
  }

  void fill_keys() {
    for (int64_t b = 0; b < p_.batch; ++b) {
      const reference::Sequence s(p_, b);
      for (int64_t head = 0; head < p_.heads_k; ++head) {
        for (int64_t j = 0; j < s.seqlen_k; ++j) {
          fill_row(p_.k, s.key_position(p_.k, j, head), p_.head_dim, shape_.amplitude);
          fill_row(p_.v, s.key_position(p_.v, j, head), p_.head_dim_v, 1);
        }
      }
    }
  }

  void fill_row(const Rows& rows, int64_t at, int64_t columns, double amplitude) {
    for (int64_t c = 0; c < columns; ++c) {
      write(dtype_, rows.data, at + c, amplitude * random_.normal());
    }
  }

  void fill_bias() {
    int64_t shape[4] = {p_.batch, p_.heads, shape_.seqlen_q, shape_.seqlen_k};
    for (int64_t& size : shape) {
      if (size > 1 && random_.chance(0.3)) {
        size = 1;
        bias_broadcasts_ = true;
      }
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
    void* data = add_input(allocate(size * (boolean ? 1 : bytes_of(dtype))));
    const double hidden = shape_.bias_hides.value_or(random_.chance(0.3)   ? 0.9
                                                     : random_.chance(0.5) ? 0.2
                                                                           : 0);
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
              static_cast<uint8_t*>(data)[at] = !hide;
            } else {
              const double x = shape_.bias_size * random_.normal();
              write(dtype, data, at, hide ? shape_.bias_hidden : x);
            }
          }
        }
      }
    }
    p_.bias = data;
    if (shape_.dbias) dbias_size_ = contiguous;
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

  Shape shape_;
  Dtype dtype_;
  Random random_;
  AttentionParams p_{};
  std::vector<Guarded> inputs_;

  bool flush_with_end_ = false;
  int64_t rows_q_ = 0, rows_k_ = 0;  // stored, per batch entry, page or in all
  int64_t pages_ = 0;
  Lengths first_, used_;  // stored keys of each sequence that are visible
  int64_t out_size_ = 0, lse_size_ = 0;
  bool bias_broadcasts_ = false;
  int64_t dq_size_ = 0, dk_size_ = 0, dv_size_ = 0, dbias_size_ = 0;
};

}  // namespace anyflash::fuzz
