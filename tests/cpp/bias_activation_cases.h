// What the tests of the bias-activation kernels share: cases, a float64 reference, the error rule.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <random>

#include "catch.h"
#include "kernels/elementwise/bias_activation_shape.h"
#include "kernels/launch.h"
#include "tests/cpp/dtypes.h"

namespace bias_activation_cases {

using anyflash::Activation;
using anyflash::bf16;
using anyflash::BiasActivationParams;
using anyflash::Direction;
using anyflash::fp16;
using anyflash::fp32;
using anyflash::kNumActivations;
namespace bias_activation = anyflash::bias_activation;

template <typename T>
inline constexpr double relative_error = 1e-5;
template <>
inline constexpr double relative_error<fp16> = 1.0 / 1024;
template <>
inline constexpr double relative_error<bf16> = 1.0 / 128;

// A matrix that ends at an unreadable page. What lies between its rows is NaN; written elements
// start as NaN too.
template <typename T>
class Matrix {
 public:
  Matrix(int64_t rows, int64_t cols, int64_t row_stride, int64_t offset)
      : rows_(rows), cols_(cols), stride_(row_stride) {
    const int64_t count = offset + (rows > 0 ? (rows - 1) * row_stride + cols : 0);
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    // 16-byte aligned apart from the offset, so up to 15 bytes short of the page's end.
    const size_t bytes = (size_t(count) * sizeof(T) + 15) / 16 * 16;
    mapped_ = (bytes + page - 1) / page * page + page;
    base_ = static_cast<char*>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + mapped_ - page, page, PROT_NONE);
    T* begin = reinterpret_cast<T*>(base_ + mapped_ - page - bytes);
    data_ = begin + offset;
    for (T* p = begin; p < begin + count; ++p) *p = anyflash::stored<T>(NAN);
  }
  ~Matrix() { munmap(base_, mapped_); }
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;

  T* data() const { return data_; }
  int64_t row_stride() const { return stride_; }
  double at(int64_t row, int64_t col) const { return anyflash::number(data_[row * stride_ + col]); }

  void randomise(std::mt19937& generator) {
    std::normal_distribution<double> normal(0.0, 2.0);
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t col = 0; col < cols_; ++col)
        data_[row * stride_ + col] = anyflash::stored<T>(normal(generator));
    }
  }

  // Elements between the rows that are no longer NaN.
  int written_between_rows() const {
    int written = 0;
    for (int64_t row = 0; row + 1 < rows_; ++row) {
      for (int64_t col = cols_; col < stride_; ++col) written += !std::isnan(at(row, col));
    }
    return written;
  }

 private:
  int64_t rows_, cols_, stride_;
  size_t mapped_;
  char* base_;
  T* data_;
};

inline double reference_activation(Activation activation, double z) {
  switch (activation) {
    case Activation::gelu_tanh:
      return 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
    case Activation::gelu_erf:
      return 0.5 * z * (1 + std::erf(z / std::sqrt(2.0)));
    case Activation::relu:
      return std::max(z, 0.0);
    case Activation::squared_relu:
      return std::max(z, 0.0) * std::max(z, 0.0);
    case Activation::silu_gate:
      return z / (1 + std::exp(-z));
  }
  return NAN;
}

inline double reference_slope(Activation activation, double z) {
  switch (activation) {
    case Activation::gelu_tanh: {
      const double c = std::sqrt(2 / M_PI);
      const double t = std::tanh(c * (z + 0.044715 * z * z * z));
      return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z);
    }
    case Activation::gelu_erf:
      return 0.5 * (1 + std::erf(z / std::sqrt(2.0))) +
             z * std::exp(-0.5 * z * z) / std::sqrt(2 * M_PI);
    case Activation::relu:
      return z > 0 ? 1 : 0;
    case Activation::squared_relu:
      return z > 0 ? 2 * z : 0;
    case Activation::silu_gate: {
      const double s = 1 / (1 + std::exp(-z));
      return s + z * s * (1 - s);
    }
  }
  return NAN;
}

struct Case {
  int64_t rows, cols;
  int64_t padding = 0;  // elements between rows
  int64_t offset = 0;   // elements from a 16-byte boundary
  bool with_bias = true;
  bool with_dbias = true;
};

// Largest error in units of the allowed one.
class Worst {
 public:
  explicit Worst(double relative) : relative_(relative) {}
  void add(double got, double expected, double scale = 1) {
    const double units =
        std::abs(got - expected) / (relative_ * std::abs(expected) + 1e-6 * scale + kSmallestFp16);
    if (!(units <= worst_)) worst_ = units;  // NaN stays
  }
  double value() const { return worst_; }

 private:
  static constexpr double kSmallestFp16 = 0x1p-24;
  double relative_;
  double worst_ = 0;
};

// launch(direction, params) calls the kernel for T and returns its code.
template <typename T, typename Launch>
void check_case(Activation activation, const Case& c, Launch launch) {
  const bool gated = activation == Activation::silu_gate;
  const int64_t in_cols = gated ? 2 * c.cols : c.cols;
  CAPTURE(int(activation), sizeof(T), c.rows, c.cols, c.padding, c.offset, c.with_bias,
          c.with_dbias);
  std::mt19937 generator(17);
  Matrix<T> x(c.rows, in_cols, in_cols + c.padding, c.offset),
      dx(c.rows, in_cols, in_cols + c.padding, c.offset);
  Matrix<T> y(c.rows, c.cols, c.cols + c.padding, c.offset),
      dy(c.rows, c.cols, c.cols + c.padding, c.offset);
  Matrix<T> bias(1, in_cols, in_cols, c.offset), dbias(1, in_cols, in_cols, c.offset);
  for (Matrix<T>* input : {&x, &dy, &bias}) input->randomise(generator);
  Matrix<float> workspace(1, bias_activation::num_partials(c.rows, c.cols) * in_cols, 0, 0);

  BiasActivationParams p{};
  p.x = x.data();
  p.bias = c.with_bias ? bias.data() : nullptr;
  p.y = y.data();
  p.dy = dy.data();
  p.dx = dx.data();
  p.dbias = c.with_dbias ? dbias.data() : nullptr;
  p.workspace = workspace.data();
  p.rows = c.rows;
  p.cols = c.cols;
  p.x_row_stride = x.row_stride();
  p.y_row_stride = y.row_stride();
  p.dy_row_stride = dy.row_stride();
  p.dx_row_stride = dx.row_stride();
  p.activation = activation;
  REQUIRE(launch(Direction::forward, p) == 0);
  REQUIRE(launch(Direction::backward, p) == 0);

  const auto z = [&](int64_t row, int64_t col) {
    return x.at(row, col) + (c.with_bias ? bias.at(0, col) : 0.0);
  };
  Worst forward(relative_error<T>), backward(relative_error<T>), bias_gradient(relative_error<T>);
  for (int64_t col = 0; col < c.cols; ++col) {
    double sum = 0, gate_sum = 0, magnitude = 0;
    for (int64_t row = 0; row < c.rows; ++row) {
      const double u = z(row, col);
      const double dy_value = dy.at(row, col);
      double du;
      if (gated) {
        const double g = z(row, c.cols + col);
        du = dy_value * reference_activation(activation, g);
        const double dg = dy_value * u * reference_slope(activation, g);
        forward.add(y.at(row, col), u * reference_activation(activation, g));
        backward.add(dx.at(row, c.cols + col), dg, std::abs(dy_value * u));
        gate_sum += dg;
      } else {
        du = dy_value * reference_slope(activation, u);
        forward.add(y.at(row, col), reference_activation(activation, u));
      }
      backward.add(dx.at(row, col), du, std::abs(dy_value));
      sum += du;
      magnitude += std::abs(dy_value * (1 + std::abs(u)));
    }
    if (!c.with_dbias) continue;
    bias_gradient.add(dbias.at(0, col), sum, magnitude);
    if (gated) bias_gradient.add(dbias.at(0, c.cols + col), gate_sum, magnitude);
  }
  CHECK(forward.value() <= 1);
  CHECK(backward.value() <= 1);
  CHECK(bias_gradient.value() <= 1);
  CHECK(y.written_between_rows() == 0);
  CHECK(dx.written_between_rows() == 0);
}

const Case kCases[] = {
    {1, 1},
    {3, 7},
    {5, 8},
    {2, 16, 8},
    {17, 256},
    {16, 264, 8, 8},
    {33, 257},
    {40, 33},
    {9, 40, 3, 0},
    {9, 40, 0, 1},
    {7, 300, 4, 4},
    {4, 24, 0, 0, false},
    {5, 19, 1, 3, false},
    {3, 24, 0, 0, true, false},
    {0, 5},
    {5, 0},
    {150, 9},
};

}  // namespace bias_activation_cases
