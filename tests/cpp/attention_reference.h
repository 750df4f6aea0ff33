// Attention in double from an AttentionParams, as csrc/schemas.def defines it: plain loops over the
// query heads of one sequence after the other.
//
// Beside each value stands how far float arithmetic may be off. The bounds follow from the sizes of
// the terms, never from the results: a sum of n products loses at most kRoundoff * (2 + 2 sqrt(n))
// of the sum of their absolute values (twice the square root is generous for roundings that do not
// conspire, and strict for few terms), a logit's error is a relative error of its probability, and
// both are carried through the sums that follow.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/launch.h"
#include "kernels/philox.h"

namespace anyflash::reference {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kRoundoff = 1.0 / (1 << 24);  // fp32

// What a kernel computes with, beside fp32.
struct Arithmetic {
  Dtype dtype;               // of the tensors
  double operand_roundoff;   // of probabilities and their gradients as they enter a product
  double exp_error;          // relative
  double operand_least = 0;  // absolute error of those near 0
  double cap_error = 0;      // of a softcap, in units of the cap
  double far_lse = 16384;    // from here on the backward makes a row's log-sum-exp again: far from
                             // 0 a float does not hold the sum of the weights
};

// Results by their position in storage; NaN where nothing is written.
struct Values {
  std::vector<double> value;
  std::vector<double> bound;

  explicit Values(int64_t size)
      : value(size, std::numeric_limits<double>::quiet_NaN()), bound(size) {}

  bool written(int64_t i) const { return !std::isnan(value[i]); }
  // Sums begin; what they come to may be too small for a float.
  void clear() {
    std::fill(value.begin(), value.end(), 0.0);
    std::fill(bound.begin(), bound.end(), 1e-30);
  }
  void set(int64_t i, double x, double error) {
    value[i] = x;
    bound[i] = error;
  }
  void add(int64_t i, double x, double error) {
    value[i] += x;
    bound[i] += error;
  }
};

inline double read(Dtype dtype, const void* data, int64_t i) {
  if (dtype == Dtype::fp32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  if (dtype == Dtype::bf16) {
    const uint32_t word = uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &word, sizeof(x));
    return x;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double size =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  if (exponent == 31) size = fraction ? std::nan("") : kInfinity;
  return bits >> 15 ? -size : size;
}

// Half the distance to the next number of the storage type, seen from x.
inline double storage_error(Dtype dtype, double x) {
  if (dtype == Dtype::fp32) return kRoundoff * std::fabs(x) + 1e-30;
  if (dtype == Dtype::bf16) return std::fabs(x) / 256 + 1e-30;
  return std::fabs(x) / 2048 + std::ldexp(1, -25);
}

inline double sum_error(int64_t terms) {
  return kRoundoff * (2 + 2 * std::sqrt(static_cast<double>(terms)));
}

// One sequence; keys count from the first visible one, after leftpad_k.
struct Sequence {
  const AttentionParams& p;
  int64_t index;
  int64_t seqlen_q;
  int64_t seqlen_k;
  int64_t first_q;  // stored row of query 0
  int64_t first_k;  // stored row of key 0

  Sequence(const AttentionParams& params, int64_t b) : p(params), index(b) {
    first_q = p.cu_seqlens_q ? p.cu_seqlens_q[b] : 0;
    first_k = p.cu_seqlens_k && !p.block_table ? p.cu_seqlens_k[b] : 0;
    seqlen_q = p.cu_seqlens_q ? p.cu_seqlens_q[b + 1] - first_q : p.seqlen_q;
    seqlen_k = p.seqused_k      ? p.seqused_k[b]
               : p.cu_seqlens_k ? p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b]
                                : p.seqlen_k;
    if (p.leftpad_k) {
      first_k += p.leftpad_k[b];
      seqlen_k = std::max<int64_t>(seqlen_k - p.leftpad_k[b], 0);
    }
  }

  int64_t query_position(const Rows& rows, int64_t i, int64_t head) const {
    return (p.cu_seqlens_q ? 0 : index * rows.batch_stride) + (first_q + i) * rows.row_stride +
           head * rows.head_stride;
  }

  int64_t key_position(const Rows& rows, int64_t j, int64_t head) const {
    int64_t entry = p.cu_seqlens_k ? 0 : index, row = first_k + j;
    if (p.block_table) {
      entry = p.block_table[index * p.block_table_stride + row / p.page_size];
      row %= p.page_size;
    }
    return entry * rows.batch_stride + row * rows.row_stride + head * rows.head_stride;
  }

  int64_t statistic_position(const RowStatistics& x, int64_t i, int64_t head) const {
    return (p.cu_seqlens_q ? 0 : index * x.batch_stride) + head * x.head_stride + first_q + i;
  }

  bool visible(int64_t i, int64_t j) const {
    const int64_t diagonal = i + seqlen_k - seqlen_q;
    return (p.window_left < 0 || j >= diagonal - p.window_left) &&
           (p.window_right < 0 || j <= diagonal + p.window_right);
  }
};

struct Matrix {
  int64_t columns;
  std::vector<double> data;

  Matrix(int64_t rows, int64_t cols) : columns(cols), data(rows * cols) {}
  double* operator[](int64_t row) { return data.data() + row * columns; }
  const double* operator[](int64_t row) const { return data.data() + row * columns; }
};

inline Matrix queries(const Sequence& s, const Rows& rows, int64_t head, int64_t columns,
                      Dtype dtype) {
  Matrix x(s.seqlen_q, columns);
  for (int64_t i = 0; i < s.seqlen_q; ++i) {
    const int64_t at = s.query_position(rows, i, head);
    for (int64_t c = 0; c < columns; ++c) x[i][c] = read(dtype, rows.data, at + c);
  }
  return x;
}

inline Matrix keys(const Sequence& s, const Rows& rows, int64_t head, int64_t columns,
                   Dtype dtype) {
  Matrix x(s.seqlen_k, columns);
  for (int64_t j = 0; j < s.seqlen_k; ++j) {
    const int64_t at = s.key_position(rows, j, head);
    for (int64_t c = 0; c < columns; ++c) x[j][c] = read(dtype, rows.data, at + c);
  }
  return x;
}

// sum a[c] * b[c], and the sum of the absolute values.
struct Dot {
  double value = 0;
  double size = 0;

  Dot(const double* a, const double* b, int64_t n) {
    for (int64_t c = 0; c < n; ++c) {
      value += a[c] * b[c];
      size += std::fabs(a[c] * b[c]);
    }
  }
};

// What query i makes of key j.
struct Logit {
  double value = -kInfinity;  // hidden
  double error = 0;
  double slope = 1;  // softcap: d value / d score
  double slope_error = 0;
};

inline Logit logit(const Sequence& s, const Arithmetic& arithmetic, int64_t head, int64_t i,
                   int64_t j, const Dot& dot) {
  const AttentionParams& p = s.p;
  Logit x;
  if (!s.visible(i, j)) return x;
  double bias = 0;
  if (p.bias) {
    const int64_t at = s.index * p.bias_stride[0] + head * p.bias_stride[1] + i * p.bias_stride[2] +
                       j * p.bias_stride[3];
    if (p.bias_type == BiasType::boolean) {
      if (!static_cast<const uint8_t*>(p.bias)[at]) return x;
    } else {
      bias = read(p.bias_type == BiasType::fp32   ? Dtype::fp32
                  : p.bias_type == BiasType::bf16 ? Dtype::bf16
                                                  : Dtype::fp16,
                  p.bias, at);
      if (bias == -kInfinity) return x;
    }
  }
  const double scale = p.softmax_scale;
  x.value = scale * dot.value;
  x.error =
      std::fabs(scale) * dot.size * sum_error(p.head_dim) + 4 * kRoundoff * std::fabs(x.value);
  if (p.softcap > 0) {
    const double t = std::tanh(x.value / p.softcap);
    x.slope = 1 - t * t;
    x.slope_error = 8 * kRoundoff + 2 * std::fabs(t) * x.error / p.softcap;
    x.value = p.softcap * t;
    x.error += 8 * kRoundoff * std::fabs(x.value) + arithmetic.cap_error * p.softcap;
  }
  double alibi = 0;
  if (p.alibi_slopes) {
    const double slope = p.alibi_slopes[s.index * p.alibi_batch_stride + head];
    const int64_t distance = i + s.seqlen_k - s.seqlen_q - j;
    const bool purely_causal = p.window_left < 0 && p.window_right == 0;
    alibi = slope * static_cast<double>(purely_causal ? j : -std::abs(distance));
  }
  x.value += alibi + bias;
  x.error += 4 * kRoundoff * (std::fabs(alibi) + std::fabs(bias) + std::fabs(x.value));
  return x;
}

// Of one element after dropout: 0, or 1 / (1 - p).
inline double dropout_factor(const Sequence& s, int64_t head, int64_t i, int64_t j) {
  const AttentionParams& p = s.p;
  if (p.dropout_p == 0) return 1;
  const Dropout dropout = Dropout::of(p.rng_state, p.dropout_p);
  const auto bh = static_cast<uint32_t>(s.index * p.heads + head);
  if (!dropout.keeps(bh, static_cast<uint32_t>(i), static_cast<uint32_t>(j))) return 0;
  return 1 / (1 - p.dropout_p);
}

// How far a probability may be off whose logit may be: at most 1, however far that is. One that is
// too small for a double may be the largest, where the logit is off by thousands.
inline double probability_error(double log_probability, double logit_error) {
  const double most = logit_error < 700 ? std::exp(log_probability) * std::expm1(logit_error)
                                        : std::exp(log_probability + logit_error);
  return std::min(1.0, most);
}

// One query row: its logits to all keys, and their softmax.
struct Row {
  std::vector<Logit> logits;
  double largest = kInfinity;  // the log-sum-exp in two parts: far from 0 one does not hold both
  double log_sum = 0;
  double lse = kInfinity;
  double lse_error = 0;  // also the relative error that all probabilities of the row share

  Row(const Sequence& s, int64_t head, int64_t i, const Matrix& q, const Matrix& k,
      const Arithmetic& arithmetic) {
    const AttentionParams& p = s.p;
    double most = -kInfinity;
    for (int64_t j = 0; j < s.seqlen_k; ++j) {
      logits.push_back(logit(s, arithmetic, head, i, j, Dot(q[i], k[j], p.head_dim)));
      most = std::max(most, logits.back().value);
    }
    if (most == -kInfinity) return;
    const double sink = p.sinks ? p.sinks[head] : -kInfinity;
    largest = std::max(most, sink);
    double sum = std::exp(sink - largest), error = sum * 4 * kRoundoff * std::fabs(sink);
    if (sum == 0) error = 0;  // no sink: the line above is 0 * infinity
    for (Logit& x : logits) {
      if (x.value == -kInfinity) continue;
      // The difference to the maximum is rounded as well.
      x.error += 2 * kRoundoff * (std::fabs(x.value) + std::fabs(largest));
      sum += std::exp(x.value - largest);
      error += std::exp(x.value - largest) * x.error;
    }
    log_sum = std::log(sum);
    lse = largest + log_sum;
    lse_error = error / sum + arithmetic.exp_error + sum_error(s.seqlen_k) +
                4 * kRoundoff * (std::fabs(largest) + std::fabs(lse));
  }
};

inline void forward(const AttentionParams& p, const Arithmetic& arithmetic, Values& out,
                    Values& lse) {
  const Dtype dtype = arithmetic.dtype;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s(p, b);
    for (int64_t head = 0; head < p.heads; ++head) {
      const int64_t head_k = head / (p.heads / p.heads_k);
      const Matrix q = queries(s, p.q, head, p.head_dim, dtype);
      const Matrix k = keys(s, p.k, head_k, p.head_dim, dtype);
      const Matrix v = keys(s, p.v, head_k, p.head_dim_v, dtype);
      for (int64_t i = 0; i < s.seqlen_q; ++i) {
        const Row row(s, head, i, q, k, arithmetic);
        std::vector<double> value(p.head_dim_v), error(p.head_dim_v);
        for (int64_t j = 0; j < s.seqlen_k && row.lse < kInfinity; ++j) {
          const Logit& x = row.logits[j];
          const double factor = dropout_factor(s, head, i, j);
          const double log_probability = x.value - row.largest - row.log_sum;
          const double probability = std::exp(log_probability);
          const double weight = probability * factor;
          if (x.value == -kInfinity || factor == 0) continue;
          const double weight_error =
              factor * (probability_error(log_probability, x.error + row.lse_error) +
                        probability * (arithmetic.exp_error + arithmetic.operand_roundoff +
                                       sum_error(s.seqlen_k)) +
                        arithmetic.operand_least);
          for (int64_t c = 0; c < p.head_dim_v; ++c) {
            value[c] += weight * v[j][c];
            error[c] += weight_error * std::fabs(v[j][c]);
          }
        }
        const int64_t at = s.query_position(p.out, i, head);
        for (int64_t c = 0; c < p.head_dim_v; ++c) {
          out.set(at + c, value[c], error[c] + storage_error(dtype, value[c]));
        }
        lse.set(s.statistic_position(p.lse, i, head), row.lse,
                row.lse < kInfinity ? row.lse_error + storage_error(Dtype::fp32, row.lse) : 0);
      }
    }
  }
  // Rows behind the last packed sequence, as far as total_q counts them, are rows without keys.
  const int64_t rest = p.cu_seqlens_q ? p.cu_seqlens_q[p.batch] : p.total_q;
  for (int64_t row = rest; row < p.total_q; ++row) {
    for (int64_t head = 0; head < p.heads; ++head) {
      const int64_t at = row * p.out.row_stride + head * p.out.head_stride;
      for (int64_t c = 0; c < p.head_dim_v; ++c) out.set(at + c, 0, 0);
      lse.set(head * p.lse.head_stride + row, kInfinity, 0);
    }
  }
}

// Gradients as they follow from params' own out and lse, whoever computed these. dbias and dsinks
// may be null; values of dbias that no sequence has are the caller's zeros.
inline void backward(const AttentionParams& p, const Arithmetic& arithmetic, Values& dq, Values& dk,
                     Values& dv, Values* dbias, Values* dsinks) {
  const Dtype dtype = arithmetic.dtype;
  const double operand = arithmetic.operand_roundoff, scale = p.softmax_scale;
  if (dbias) dbias->clear();
  if (dsinks) dsinks->clear();
  int64_t rows_of_all = 0;
  for (int64_t b = 0; b < p.batch; ++b) rows_of_all += Sequence(p, b).seqlen_q;

  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s(p, b);
    const int64_t group = p.heads / p.heads_k;
    const double rows_error = sum_error(s.seqlen_q * group), keys_error = sum_error(s.seqlen_k);
    for (int64_t head_k = 0; head_k < p.heads_k; ++head_k) {
      const Matrix k = keys(s, p.k, head_k, p.head_dim, dtype);
      const Matrix v = keys(s, p.v, head_k, p.head_dim_v, dtype);
      Matrix k_gradient(s.seqlen_k, p.head_dim), k_error(s.seqlen_k, p.head_dim);
      Matrix v_gradient(s.seqlen_k, p.head_dim_v), v_error(s.seqlen_k, p.head_dim_v);
      for (int64_t head = head_k * group; head < (head_k + 1) * group; ++head) {
        const Matrix q = queries(s, p.q, head, p.head_dim, dtype);
        const Matrix out = queries(s, p.out, head, p.head_dim_v, dtype);
        const Matrix dout = queries(s, p.dout, head, p.head_dim_v, dtype);
        for (int64_t i = 0; i < s.seqlen_q; ++i) {
          std::vector<double> q_gradient(p.head_dim), q_error(p.head_dim);
          const double lse = p.lse.data[s.statistic_position(p.lse, i, head)];
          double largest = lse, log_sum = 0, lse_error = 4 * kRoundoff * std::fabs(lse);
          if (lse < kInfinity && std::fabs(lse) >= arithmetic.far_lse) {
            const Row row(s, head, i, q, k, arithmetic);
            largest = row.largest, log_sum = row.log_sum, lse_error = row.lse_error;
          }
          double dlse = 0;
          if (p.dlse.data) dlse = p.dlse.data[s.statistic_position(p.dlse, i, head)];
          const Dot dout_out(dout[i], out[i], p.head_dim_v);
          const double delta = dout_out.value - dlse;
          const double delta_error = sum_error(p.head_dim_v) * (dout_out.size + std::fabs(dlse));
          for (int64_t j = 0; j < s.seqlen_k && lse < kInfinity; ++j) {
            const Dot dot(q[i], k[j], p.head_dim);
            const Logit x = logit(s, arithmetic, head, i, j, dot);
            if (x.value == -kInfinity) continue;
            const double log_probability = x.value - largest - log_sum;
            const double probability = std::exp(log_probability);
            const double error =
                probability_error(log_probability,
                                  x.error + lse_error + 4 * kRoundoff * std::fabs(x.value)) +
                probability * arithmetic.exp_error;
            const double factor = dropout_factor(s, head, i, j), weight = probability * factor;
            const double weight_slack =
                factor * (error + arithmetic.operand_least) + weight * (operand + rows_error);
            for (int64_t c = 0; c < p.head_dim_v; ++c) {
              v_gradient[j][c] += weight * dout[i][c];
              v_error[j][c] += weight_slack * std::fabs(dout[i][c]);
            }
            const Dot dout_v(dout[i], v[j], p.head_dim_v);
            double gradient = probability * (factor * dout_v.value - delta);
            double slack =
                std::fabs(factor * dout_v.value - delta) * error +
                probability *
                    (factor * dout_v.size * sum_error(p.head_dim_v) + delta_error +
                     4 * kRoundoff * (factor * std::fabs(dout_v.value) + std::fabs(delta)));
            if (dbias) {
              const int64_t at = b * p.dbias_stride[0] + head * p.dbias_stride[1] +
                                 i * p.dbias_stride[2] + j * p.dbias_stride[3];
              const int64_t terms = p.batch * p.heads * s.seqlen_q * s.seqlen_k;
              dbias->add(at, gradient, slack + sum_error(terms) * std::fabs(gradient));
            }
            slack = slack * x.slope + std::fabs(gradient) * x.slope_error;
            gradient *= x.slope;
            slack += operand * std::fabs(gradient) + arithmetic.operand_least;
            const double q_slack = slack + keys_error * std::fabs(gradient);
            const double k_slack = slack + rows_error * std::fabs(gradient);
            for (int64_t c = 0; c < p.head_dim; ++c) {
              q_gradient[c] += gradient * k[j][c];
              q_error[c] += q_slack * std::fabs(k[j][c]);
              k_gradient[j][c] += gradient * q[i][c];
              k_error[j][c] += k_slack * std::fabs(q[i][c]);
            }
          }
          const int64_t at = s.query_position(p.dq, i, head);
          for (int64_t c = 0; c < p.head_dim; ++c) {
            const double x = scale * q_gradient[c];
            dq.set(at + c, x, std::fabs(scale) * q_error[c] + storage_error(dtype, x));
          }
          if (dsinks && lse < kInfinity) {
            const double sink = p.sinks[head], log_probability = sink - largest - log_sum;
            const double probability = std::exp(log_probability);
            const double error =
                probability_error(log_probability, lse_error + 4 * kRoundoff * std::fabs(sink)) +
                probability * (arithmetic.exp_error + sum_error(rows_of_all));
            dsinks->add(head, -probability * delta,
                        probability * delta_error + std::fabs(delta) * error);
          }
        }
      }
      for (int64_t j = 0; j < s.seqlen_k; ++j) {
        const int64_t k_at = s.key_position(p.dk, j, head_k),
                      v_at = s.key_position(p.dv, j, head_k);
        for (int64_t c = 0; c < p.head_dim; ++c) {
          const double x = scale * k_gradient[j][c];
          dk.set(k_at + c, x, std::fabs(scale) * k_error[j][c] + storage_error(dtype, x));
        }
        for (int64_t c = 0; c < p.head_dim_v; ++c) {
          const double x = v_gradient[j][c];
          dv.set(v_at + c, x, v_error[j][c] + storage_error(dtype, x));
        }
      }
    }
  }
  // Rows behind the last packed sequence.
  const auto clear_rest = [](Values& x, const Rows& rows, int64_t begin, int64_t end, int64_t heads,
                             int64_t columns) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t c = 0; c < columns; ++c) {
          x.set(row * rows.row_stride + head * rows.head_stride + c, 0, 0);
        }
      }
    }
  };
  if (p.cu_seqlens_q) {
    clear_rest(dq, p.dq, p.cu_seqlens_q[p.batch], p.total_q, p.heads, p.head_dim);
  }
  if (p.cu_seqlens_k && !p.seqused_k) {
    clear_rest(dk, p.dk, p.cu_seqlens_k[p.batch], p.total_k, p.heads_k, p.head_dim);
    clear_rest(dv, p.dv, p.cu_seqlens_k[p.batch], p.total_k, p.heads_k, p.head_dim_v);
  }
}

}  // namespace anyflash::reference
