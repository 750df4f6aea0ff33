// Draws a Shape: every feature with every other, sizes small enough for plain loops.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/features.h"
#include "kernels/launch.h"
#include "tests/fuzz/random.h"
#include "tests/fuzz/shape.h"

namespace anyflash::fuzz {

enum class Kind { any, forward, decode, backward };

// What the kernels under test take.
struct Scope {
  Dtype dtype;
  Features features;
  bool has_backward;
  Kind kind = Kind::any;
  int64_t max_head_dim = 512;
  int64_t head_dim_multiple = 1;
  bool far_scores = true;    // q and k may be large
  int64_t work = 4'000'000;  // the reference multiplies one number after the other

  bool allows(Features feature) const { return (features & feature) == feature; }
};

class ShapeDrawer {
 public:
  ShapeDrawer(Random& random, const Scope& scope) : random_(random), scope_(scope) {
    choose_sizes();
    choose_lengths();
    choose_features();
  }
  const Shape& shape() const { return shape_; }

 private:
  int64_t head_dim() {
    static constexpr int64_t kUsual[] = {16, 32, 64, 96, 128};
    int64_t size = random_.log_integer(1, scope_.max_head_dim);
    if (random_.chance(0.3)) size = kUsual[random_.integer(0, 4)];
    const int64_t multiple = scope_.head_dim_multiple;
    return std::min((size + multiple - 1) / multiple * multiple, scope_.max_head_dim);
  }

  void choose_sizes() {
    Kind kind = scope_.kind;
    if (kind == Kind::any && random_.chance(0.2)) kind = Kind::decode;
    const bool decode = kind == Kind::decode;
    Shape& s = shape_;
    s.batch = random_.chance(0.02) ? 0 : random_.log_integer(1, 4);
    s.heads_k = random_.log_integer(1, 4);
    s.heads = s.heads_k * (random_.chance(0.5) ? 1 : random_.log_integer(1, 8));
    s.head_dim = head_dim();
    s.head_dim_v =
        random_.chance(0.6) || !scope_.allows(Feature::unequal_head_dims) ? s.head_dim : head_dim();
    s.seqlen_q =
        decode ? random_.integer(1, 16) : random_.log_integer(1, random_.chance(0.1) ? 1200 : 300);
    s.seqlen_k = random_.log_integer(1, decode || random_.chance(0.2) ? 2000 : 300);
    if (!decode && random_.chance(0.4)) s.seqlen_k = s.seqlen_q;
    if (decode && random_.chance(0.4)) {  // so many keys that items get parts of them
      s.batch = 1;
      s.seqlen_q = random_.integer(1, 3);
      s.seqlen_k = random_.integer(4000, 30000);
      if (random_.chance(0.7))
        s.head_dim = s.head_dim_v = std::min<int64_t>(128, scope_.max_head_dim);
    }
    reduce_work(decode);
    if (random_.chance(0.01)) s.seqlen_q = 0;
    if (random_.chance(0.02)) s.seqlen_k = 0;
    packed_ = random_.chance(0.4);
    paged_ = kind != Kind::backward && random_.chance(decode ? 0.4 : 0.1);
    s.backward = scope_.has_backward && !paged_ && kind != Kind::forward &&
                 (!decode || random_.chance(0.3)) &&
                 random_.chance(kind == Kind::backward ? 1 : 0.7);
    s.dlse = s.backward && random_.chance(0.4);
  }

  void reduce_work(bool decode) {
    Shape& s = shape_;
    const int64_t multiple = scope_.head_dim_multiple;
    const auto half = [&](int64_t columns) {
      return (columns / 2 + multiple - 1) / multiple * multiple;
    };
    while (s.batch * s.heads * s.seqlen_q * s.seqlen_k * (s.head_dim + s.head_dim_v) >
           scope_.work) {
      if (s.batch > 2) {
        s.batch /= 2;
      } else if (s.heads > 4) {
        s.heads_k = std::max<int64_t>(1, s.heads_k / 2);
        s.heads = std::max<int64_t>(s.heads_k, s.heads / 2 / s.heads_k * s.heads_k);
      } else if (s.head_dim > 150 && s.head_dim_v > 150) {
        s.head_dim = half(s.head_dim);
        s.head_dim_v = half(s.head_dim_v);
      } else if (!decode && s.seqlen_q > 40) {
        s.seqlen_q = s.seqlen_q * 2 / 3;
      } else {
        s.seqlen_k = s.seqlen_k * 2 / 3;
      }
    }
  }

  int32_t length(int64_t longest) {
    if (random_.chance(0.15)) return 0;
    return static_cast<int32_t>(random_.chance(0.3) || longest == 0 ? longest
                                                                    : random_.integer(1, longest));
  }
  Lengths lengths(int64_t longest) {
    Lengths drawn;
    for (int64_t b = 0; b < shape_.batch; ++b) drawn.push_back(length(longest));
    return drawn;
  }

  void choose_lengths() {
    Shape& s = shape_;
    s.slack = random_.integer(0, 3);
    if (packed_) s.packed_q = lengths(s.seqlen_q);
    if (packed_ && !paged_) s.packed_k = lengths(s.seqlen_k);
    Lengths used = s.packed_k ? *s.packed_k : Lengths(s.batch, static_cast<int32_t>(s.seqlen_k));
    if (paged_) {
      s.page_size = random_.log_integer(1, 256);
      if (random_.chance(0.3)) s.held_k = used = lengths(s.seqlen_k);
    }
    if ((paged_ && !s.held_k) || random_.chance(0.25)) {
      s.seqused_k = lengths(s.seqlen_k);
      for (int64_t b = 0; s.packed_k && b < s.batch; ++b) {  // the rest of its rows is a gap
        (*s.seqused_k)[b] = length((*s.packed_k)[b]);
      }
      used = *s.seqused_k;
    }
    if (random_.chance(0.2)) {
      for (int32_t& keys : used) {
        keys = static_cast<int32_t>(random_.integer(0, std::min(keys, 40)));
      }
      s.leftpad_k = used;
    }
  }

  void choose_features() {
    Shape& s = shape_;
    const double usual = 1 / std::sqrt(static_cast<double>(s.head_dim));
    s.softmax_scale = static_cast<float>(usual * std::exp(2 * random_.uniform() - 1));
    if (random_.chance(0.03)) s.softmax_scale = random_.chance(0.5) ? 0 : -*s.softmax_scale;
    const auto width = [&] { return random_.chance(0.3) ? 0 : random_.log_integer(1, 300); };
    if (random_.chance(0.5)) s.window_right = random_.chance(0.7) ? 0 : width();
    if (random_.chance(0.25)) s.window_left = width();
    const auto draws = [&](double probability, Features feature) {
      return random_.chance(probability) && scope_.allows(feature);
    };
    if (draws(0.2, Feature::softcap)) {
      s.softcap = static_cast<float>(std::exp(4 * random_.uniform() - 1));
    }
    if (draws(0.2, Feature::alibi)) {
      s.alibi = random_.chance(0.5) ? Slopes::heads : Slopes::batch_heads;
    }
    s.sinks = draws(0.25, Feature::sinks);
    s.dsinks = s.sinks && s.backward && random_.chance(0.8);
    if (draws(0.2, Feature::dropout)) {
      const bool nearly_all = random_.chance(0.1) && scope_.dtype != Dtype::fp16;
      s.dropout_p = nearly_all ? 0.99999 : 0.05 + 0.85 * random_.uniform();
    }
    if (draws(0.25, Feature::bias)) {
      static constexpr BiasType kTypes[] = {BiasType::fp16, BiasType::bf16, BiasType::fp32,
                                            BiasType::boolean};
      s.bias_type = kTypes[random_.integer(0, 3)];
      s.dbias = s.backward && s.bias_type != BiasType::boolean && random_.chance(0.7);
    }
    // Now and then numbers from far away, up to what is left of them after a sum.
    const auto size = [&](bool half) {
      if (!random_.chance(0.02)) return 1.0;
      return std::pow(10.0, random_.uniform() * (half ? 3 : 35));
    };
    s.amplitude = std::sqrt(size(scope_.dtype == Dtype::fp16));
    if (!scope_.far_scores) s.amplitude = 1;
    s.bias_size = size(s.bias_type == BiasType::fp16);
    s.sink_size = size(false);
    s.strides = Strides::random;
    s.alignment = scope_.head_dim_multiple;
  }

  Random& random_;
  const Scope& scope_;
  Shape shape_;
  bool packed_ = false;
  bool paged_ = false;
};

inline Shape random_shape(Random& random, const Scope& scope) {
  return ShapeDrawer(random, scope).shape();
}

}  // namespace anyflash::fuzz
