// A Shape in one line: Sketch(seqlen_q, seqlen_k, head_dim).causal().heads(8, 2).
#pragma once

#include <utility>

#include "tests/fuzz/shape.h"

namespace anyflash::emulated {

using fuzz::Lengths;
using fuzz::Slopes;
using fuzz::Strides;

// Two heads, everything else off until it is asked for.
class Sketch {
 public:
  Sketch(int64_t seqlen_q, int64_t seqlen_k, int64_t head_dim) {
    shape_.seqlen_q = seqlen_q;
    shape_.seqlen_k = seqlen_k;
    shape_.head_dim = shape_.head_dim_v = head_dim;
    shape_.alignment = 8;
  }
  operator fuzz::Shape() const { return shape_; }

  Sketch& batch(int64_t sequences) { return set(shape_.batch, sequences); }
  Sketch& heads(int64_t of_q, int64_t of_k) {
    shape_.heads_k = of_k;
    return set(shape_.heads, of_q);
  }
  Sketch& head_dim_v(int64_t columns) { return set(shape_.head_dim_v, columns); }

  // Sequences that follow each other, and unused rows behind them.
  Sketch& packed(Lengths of_q, Lengths of_k) {
    shape_.packed_k = std::move(of_k);
    return packed_queries(std::move(of_q));
  }
  Sketch& packed_queries(Lengths lengths) {
    shape_.batch = static_cast<int64_t>(lengths.size());
    shape_.slack = 3;
    shape_.packed_q = std::move(lengths);
    return *this;
  }
  Sketch& used(Lengths keys) {
    shape_.batch = static_cast<int64_t>(keys.size());
    shape_.seqused_k = std::move(keys);
    return *this;
  }
  Sketch& leftpad(Lengths keys) {
    shape_.batch = static_cast<int64_t>(keys.size());
    shape_.leftpad_k = std::move(keys);
    return *this;
  }
  Sketch& pages(int64_t size) { return set(shape_.page_size, size); }
  Sketch& held(Lengths keys) {
    shape_.batch = static_cast<int64_t>(keys.size());
    shape_.held_k = std::move(keys);
    return *this;
  }

  Sketch& causal() { return set(shape_.window_right, int64_t{0}); }
  Sketch& window(int64_t left, int64_t right) {
    shape_.window_left = left;
    return set(shape_.window_right, right);
  }
  Sketch& softcap(double cap) { return set(shape_.softcap, cap); }
  Sketch& alibi(Slopes slopes) { return set(shape_.alibi, slopes); }
  // Its gradient is wanted too, unless it is boolean.
  Sketch& bias(BiasType type, const char* shape = "bhqk", double size = 1) {
    shape_.bias_type = type;
    shape_.bias_shape = shape;
    shape_.bias_size = size;
    return set(shape_.dbias, type != BiasType::boolean);
  }
  // Of the bias so much is `value`, for whole rows of it where that is all.
  Sketch& hidden(double share, double value) {
    shape_.bias_hides = share;
    return set(shape_.bias_hidden, value);
  }
  Sketch& sinks(double size = 1) {
    shape_.sink_size = size;
    return set(shape_.sinks, true);
  }
  Sketch& lse_gradient() { return set(shape_.dlse, true); }
  Sketch& dropout(double p) { return set(shape_.dropout_p, p); }
  Sketch& scale(double x) {
    shape_.softmax_scale = x;
    return *this;
  }
  Sketch& amplitude(double x) { return set(shape_.amplitude, x); }
  Sketch& strides(Strides x) { return set(shape_.strides, x); }

 private:
  template <class T>
  Sketch& set(T& field, T value) {
    field = value;
    return *this;
  }

  fuzz::Shape shape_;
};

}  // namespace anyflash::emulated
