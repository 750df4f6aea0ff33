// y = activation(x + bias) and its gradients, row by row. The bias gradient is summed over fixed
// chunks of rows, then over the chunks: the same bits for any number of threads.
#pragma once

#include "kernels/cpu/simd.h"
#include "kernels/cpu/work.h"
#include "kernels/elementwise/bias_activation_shape.h"
#include "kernels/launch.h"

namespace anyflash::cpu::ANYFLASH_ISA {

// ---- Activations.

// 1 / (1 + exp(-z)), through exp(-|z|), which never overflows.
ANYFLASH_INLINE Float sigmoid(Float z) {
  const Float e = exp2<6>(maximum(z, -z) * broadcast(-1.44269504f));
  return select(z < Float{}, e, broadcast(1.0f)) / (1.0f + e);
}

// exp(-z^2 / 2)
ANYFLASH_INLINE Float bell(Float z) { return exp2<6>(z * z * broadcast(-0.72134752f)); }

// The normal distribution. Its tail below -|z| is bell(z) t P(t) with t = 1 / (1 + 0.26 |z|); P has
// the least maximal relative error, 3e-8, for |z| up to 14, where the tail is 0 in fp32.
ANYFLASH_INLINE Float normal_probability(Float z) {
  const Float t = 1.0f / multiply_add(maximum(z, -z), broadcast(0.26f), broadcast(1.0f));
  Float p = multiply_add(broadcast(3.050479682e-2f), t, broadcast(-1.528284354e-1f));
  p = multiply_add(p, t, broadcast(2.514905648e-1f));
  p = multiply_add(p, t, broadcast(-1.509482217e-1f));
  p = multiply_add(p, t, broadcast(1.609473981e-1f));
  p = multiply_add(p, t, broadcast(5.102785599e-2f));
  p = multiply_add(p, t, broadcast(1.030302138e-1f));
  p = multiply_add(p, t, broadcast(1.030167555e-1f));
  p = multiply_add(p, t, broadcast(1.037590596e-1f));
  const Float tail = p * t * bell(z);
  return select(z < Float{}, tail, 1.0f - tail);
}

constexpr float kTwoSqrt2OverPi = 1.59576912f;  // 2 sqrt(2 / pi)
constexpr float kGeluCubic = 0.044715f;
constexpr float kInvSqrt2Pi = 0.39894228f;

// (1 + tanh(t)) / 2 = sigmoid(2t)
ANYFLASH_INLINE Float gelu_tanh_probability(Float z) {
  return sigmoid(z * (kTwoSqrt2OverPi + (kTwoSqrt2OverPi * kGeluCubic) * (z * z)));
}

// a(z), for silu_gate the gate's.
template <Activation kActivation>
ANYFLASH_INLINE Float activate(Float z) {
  if constexpr (kActivation == Activation::gelu_tanh) return z * gelu_tanh_probability(z);
  if constexpr (kActivation == Activation::gelu_erf) return z * normal_probability(z);
  if constexpr (kActivation == Activation::silu_gate) return z * sigmoid(z);
  const Float positive = select(z < Float{}, Float{}, z);  // keeps NaN
  return kActivation == Activation::relu ? positive : positive * positive;
}

// dy da/dz, in an order in which 0 meets infinity only where z^2 overflows.
template <Activation kActivation>
ANYFLASH_INLINE Float gradient(Float dy, Float z) {
  if constexpr (kActivation == Activation::gelu_tanh) {
    const Float s = gelu_tanh_probability(z);
    const Float slope = kTwoSqrt2OverPi + (3 * kTwoSqrt2OverPi * kGeluCubic) * (z * z);
    return dy * (s + z * s * (1.0f - s) * slope);
  } else if constexpr (kActivation == Activation::gelu_erf) {
    return dy * (normal_probability(z) + z * bell(z) * kInvSqrt2Pi);
  } else if constexpr (kActivation == Activation::silu_gate) {
    const Float s = sigmoid(z);
    return dy * (s * (1.0f + z * (1.0f - s)));
  } else {
    const Float slope = kActivation == Activation::relu ? broadcast(1.0f) : z + z;
    return select(z <= Float{}, Float{}, dy * slope);
  }
}

// ---- Rows.

ANYFLASH_INLINE void add_some(float* sums, Float x, int count) {
  store_some(sums, load_some(sums, count) + x, count);
}

// The operands of a row; bias and sums may be null.
template <class T>
struct ActivationRow {
  const T* x;
  const T* bias;

  __attribute__((always_inline)) Float z(int64_t column, int count) const {
    const Float value = load_some(x + column, count);
    return bias ? value + load_some(bias + column, count) : value;
  }
};

template <Activation kActivation, class T>
ANYFLASH_INLINE void activate_row(const ActivationRow<T>& row, int64_t cols, T* y) {
  for_columns(0, cols, [&](int64_t column, int count) __attribute__((always_inline)) {
    const Float z = row.z(column, count);
    if constexpr (kActivation == Activation::silu_gate) {
      const Float gate = row.z(cols + column, count);
      store_some(y + column, z * activate<kActivation>(gate), count);
    } else {
      store_some(y + column, activate<kActivation>(z), count);
    }
  });
}

template <Activation kActivation, class T>
ANYFLASH_INLINE void gradient_row(const ActivationRow<T>& row, const T* dy, int64_t cols, T* dx,
                                  float* sums) {
  const auto write = [&](Float dz, int64_t column, int count) __attribute__((always_inline)) {
    store_some(dx + column, dz, count);
    if (sums != nullptr) add_some(sums + column, dz, count);
  };
  for_columns(0, cols, [&](int64_t column, int count) __attribute__((always_inline)) {
    const Float z = row.z(column, count), dy_here = load_some(dy + column, count);
    if constexpr (kActivation == Activation::silu_gate) {
      const Float gate = row.z(cols + column, count);
      write(dy_here * activate<kActivation>(gate), column, count);
      write(gradient<kActivation>(dy_here * z, gate), cols + column, count);
    } else {
      write(gradient<kActivation>(dy_here, z), column, count);
    }
  });
}

// ---- Tasks of run_parallel.

// Elements that are worth a thread: some microseconds.
constexpr int64_t kTaskElements = 1 << 14;

ANYFLASH_INLINE int64_t rows_per_task(const BiasActivationParams& p) {
  return larger<int64_t>(1, kTaskElements / p.cols);
}

ANYFLASH_INLINE int64_t input_columns(const BiasActivationParams& p) {
  return p.activation == Activation::silu_gate ? 2 * p.cols : p.cols;
}

template <class T, Activation kActivation>
static void activate_rows(void* params, int64_t task, char*) {
  const auto& p = *static_cast<const BiasActivationParams*>(params);
  const int64_t begin = task * rows_per_task(p);
  const int64_t end = smaller(p.rows, begin + rows_per_task(p));
  for (int64_t row = begin; row < end; ++row) {
    activate_row<kActivation>(ActivationRow<T>{static_cast<const T*>(p.x) + row * p.x_row_stride,
                                               static_cast<const T*>(p.bias)},
                              p.cols, static_cast<T*>(p.y) + row * p.y_row_stride);
  }
}

// One chunk of rows, and its sums in the workspace if dbias is wanted.
template <class T, Activation kActivation>
static void gradient_rows(void* params, int64_t chunk, char*) {
  const auto& p = *static_cast<const BiasActivationParams*>(params);
  const int64_t chunk_rows =
      bias_activation::ceil_div(p.rows, bias_activation::num_partials(p.rows, p.cols));
  const int64_t begin = chunk * chunk_rows, end = smaller(p.rows, begin + chunk_rows);
  const int64_t in_cols = input_columns(p);
  float* sums = nullptr;
  if (p.dbias != nullptr) {
    sums = static_cast<float*>(p.workspace) + chunk * in_cols;
    memset(sums, 0, static_cast<size_t>(in_cols) * sizeof(float));
  }
  for (int64_t row = begin; row < end; ++row) {
    gradient_row<kActivation>(ActivationRow<T>{static_cast<const T*>(p.x) + row * p.x_row_stride,
                                               static_cast<const T*>(p.bias)},
                              static_cast<const T*>(p.dy) + row * p.dy_row_stride, p.cols,
                              static_cast<T*>(p.dx) + row * p.dx_row_stride, sums);
  }
}

constexpr int64_t kSumColumns = 512;

// dbias of some columns, from the sums of all chunks.
template <class T>
static void sum_chunks(void* params, int64_t task, char*) {
  const auto& p = *static_cast<const BiasActivationParams*>(params);
  const int64_t chunks = bias_activation::num_partials(p.rows, p.cols), in_cols = input_columns(p);
  const int64_t begin = task * kSumColumns, end = smaller(in_cols, begin + kSumColumns);
  for_columns(begin, end, [&](int64_t column, int count) __attribute__((always_inline)) {
    const float* sums = static_cast<const float*>(p.workspace) + column;
    Float total{};
    for (int64_t i = 0; i < chunks; ++i) total = total + load_some(sums + i * in_cols, count);
    store_some(static_cast<T*>(p.dbias) + column, total, count);
  });
}

// ---- The instances.

using Task = void (*)(void* params, int64_t task, char* scratch);

template <class T>
ANYFLASH_INLINE int32_t bias_activation_forward(const void* params, void* stream) {
  constexpr Task kTasks[kNumActivations] = {
      activate_rows<T, Activation::gelu_tanh>, activate_rows<T, Activation::gelu_erf>,
      activate_rows<T, Activation::relu>, activate_rows<T, Activation::squared_relu>,
      activate_rows<T, Activation::silu_gate>};
  const auto& p = *static_cast<const BiasActivationParams*>(params);
  const auto activation = static_cast<uint32_t>(p.activation);
  if (activation >= kNumActivations) return kErrorInvalidParams;
  if (p.cols == 0) return 0;
  const int64_t tasks = bias_activation::ceil_div(p.rows, rows_per_task(p));
  return run_parallel(static_cast<const CpuThreads*>(stream), tasks, tasks, 0, kTasks[activation],
                      const_cast<void*>(params));
}

template <class T>
ANYFLASH_INLINE int32_t bias_activation_backward(const void* params, void* stream) {
  constexpr Task kTasks[kNumActivations] = {
      gradient_rows<T, Activation::gelu_tanh>, gradient_rows<T, Activation::gelu_erf>,
      gradient_rows<T, Activation::relu>, gradient_rows<T, Activation::squared_relu>,
      gradient_rows<T, Activation::silu_gate>};
  const auto& p = *static_cast<const BiasActivationParams*>(params);
  const auto activation = static_cast<uint32_t>(p.activation);
  if (activation >= kNumActivations) return kErrorInvalidParams;
  if (p.cols == 0) return 0;
  const auto* threads = static_cast<const CpuThreads*>(stream);
  void* context = const_cast<void*>(params);
  const int64_t chunks = bias_activation::num_partials(p.rows, p.cols);
  const int64_t max_threads = larger<int64_t>(1, p.rows * p.cols / kTaskElements);
  const int32_t error = run_parallel(threads, max_threads, chunks, 0, kTasks[activation], context);
  if (error != 0 || p.dbias == nullptr) return error;
  const int64_t in_cols = input_columns(p);
  return run_parallel(threads, larger<int64_t>(1, chunks * in_cols / kTaskElements),
                      bias_activation::ceil_div(in_cols, kSumColumns), 0, sum_chunks<T>, context);
}

}  // namespace anyflash::cpu::ANYFLASH_ISA
