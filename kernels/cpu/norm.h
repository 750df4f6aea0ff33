// Layer norm and RMS norm of a sum, row by row: the row's sum stands in fp32 in the cache while its
// statistics and its results are made of it, so that memory is read and written once.
#pragma once

#include "kernels/cpu/simd.h"
#include "kernels/cpu/work.h"
#include "kernels/launch.h"
#include "kernels/norm_params.h"

namespace anyflash::cpu::ANYFLASH_ISA {

// ---- A row's operands.

template <class T, class Row>
ANYFLASH_INLINE T* row_of(const Row& rows, int64_t row) {
  return rows.data == nullptr ? nullptr : static_cast<T*>(rows.data) + row * rows.row_stride;
}

// f(a number of that type)
template <class F>
ANYFLASH_INLINE void with_storage(Dtype dtype, F f) {
  if (dtype == Dtype::fp32) return f(fp32{});
  if (dtype == Dtype::bf16) return f(bf16{});
  f(fp16{});
}

// What multiplies a row of x or x1, and which of its elements stay.
struct Dropout {
  const uint8_t* mask;  // or null
  Float factor;

  __attribute__((always_inline)) Float apply(Float x, int64_t column, int count) const {
    x = x * factor;
    return mask ? select(nonzero_bytes(mask + column, count), x, Float{}) : x;
  }
};

ANYFLASH_INLINE Dropout dropout_of(const NormParams& p, const NormRows<const uint8_t>& mask,
                                   int64_t row) {
  return {row_of<const uint8_t>(mask, row), broadcast(mask.data ? p.keep_scale : 1.0f)};
}

ANYFLASH_INLINE float scale_of(const NormParams& p, int64_t row) {
  return p.rowscale ? p.rowscale[row] : 1.0f;
}

// ---- Forward.

// z of a row, into the cache and, if wanted, into residual_out; returns the sum of z, for RMS norm
// of z^2.
template <class T, class R>
static float add_row(const NormParams& p, int64_t row, float* z) {
  const T* x = row_of<const T>(p.x, row);
  const T* x1 = row_of<const T>(p.x1, row);
  const R* residual = row_of<const R>(p.residual, row);
  R* residual_out = row_of<R>(p.residual_out, row);
  Dropout dropout = dropout_of(p, p.mask, row);
  const Dropout dropout1 = dropout_of(p, p.mask1, row);
  dropout.factor = dropout.factor * scale_of(p, row);
  Float total{}, squares{};
  for_columns(0, p.cols, [&](int64_t column, int count) __attribute__((always_inline)) {
    Float here = dropout.apply(load_some(x + column, count), column, count);
    if (x1) here = here + dropout1.apply(load_some(x1 + column, count), column, count);
    if (residual) here = here + load_some(residual + column, count);
    if (residual_out) store_some(residual_out + column, here, count);
    store(z + column, here);
    total = total + here;
    squares = multiply_add(here, here, squares);
  });
  return sum(p.is_rms_norm ? squares : total);
}

// The sum of (z - mean)^2. What lies behind the last column becomes the mean.
ANYFLASH_INLINE float centred_squares(float* z, int64_t cols, float mean) {
  const int64_t padded = norm_padded_cols(cols);
  for (int64_t column = cols; column < padded; ++column) z[column] = mean;
  Float squares{};
  for (int64_t column = 0; column < padded; column += kLanes) {
    const Float centred = load(z + column) - mean;
    squares = multiply_add(centred, centred, squares);
  }
  return sum(squares);
}

template <class Y>
static void write_row(const NormParams& p, Y* y, const float* z, float mean, float rstd,
                      const float* weight, const float* bias) {
  for_columns(0, p.cols, [&](int64_t column, int count) __attribute__((always_inline)) {
    const Float normalised = (load(z + column) - mean) * rstd;
    const Float scale = load_some(weight + column, count) + p.weight_offset;
    const Float shift = bias ? load_some(bias + column, count) : Float{};
    store_some(y + column, multiply_add(normalised, scale, shift), count);
  });
}

template <class T>
ANYFLASH_INLINE void norm_row(const NormParams& p, int64_t row, float* z) {
  float total = 0;
  with_storage(p.sum_dtype, [&](auto r) { total = add_row<T, decltype(r)>(p, row, z); });
  const auto cols = static_cast<float>(p.cols);
  const float mean = p.is_rms_norm ? 0.0f : total / cols;
  const float squares = p.is_rms_norm ? total : centred_squares(z, p.cols, mean);
  const float rstd = 1.0f / __builtin_sqrtf(squares / cols + p.eps);
  if (p.mean) p.mean[row] = mean;
  p.rstd[row] = rstd;
  with_storage(p.out_dtype, [&](auto y) {
    using Y = decltype(y);
    write_row(p, row_of<Y>(p.y, row), z, mean, rstd, p.weight, p.bias);
    if (p.weight1) write_row(p, row_of<Y>(p.y1, row), z, mean, rstd, p.weight1, p.bias1);
  });
}

// ---- Backward.

// What a chunk of rows adds to the gradients of the weights; each null where it is not wanted.
struct WeightSums {
  float* dweight;
  float* dbias;
  float* dweight1;
  float* dbias1;
};

// From a row of z and dy: (z - mean) rstd and the gradient of it, into the cache, and the sums.
struct RowMeans {
  float gradient;    // mean of the gradient
  float projection;  // mean of the gradient times the normalised row
};

template <class Y>
ANYFLASH_INLINE Float add_products(const NormParams& p, const Y* dy, const float* weight,
                                   Float normalised, float* dweight, float* dbias, int64_t column,
                                   int count) {
  const Float here = load_some(dy + column, count);
  store(dweight + column, multiply_add(here, normalised, load(dweight + column)));
  if (dbias) store(dbias + column, load(dbias + column) + here);
  return here * (load_some(weight + column, count) + p.weight_offset);
}

template <class R, class Y>
static RowMeans differentiate_row(const NormParams& p, int64_t row, const WeightSums& sums,
                                  float* normalised, float* gradient) {
  const R* z = row_of<const R>(p.z, row);
  const Y* dy = row_of<const Y>(p.dy, row);
  const Y* dy1 = row_of<const Y>(p.dy1, row);
  const float mean = p.mean ? p.mean[row] : 0.0f, rstd = p.rstd[row];
  Float total{}, projection{};
  for_columns(0, p.cols, [&](int64_t column, int count) __attribute__((always_inline)) {
    const Float unit = (load_some(z + column, count) - mean) * rstd;
    Float here = add_products(p, dy, p.weight, unit, sums.dweight, sums.dbias, column, count);
    if (dy1) {
      here =
          here + add_products(p, dy1, p.weight1, unit, sums.dweight1, sums.dbias1, column, count);
    }
    store(normalised + column, unit);
    store(gradient + column, here);
    total = total + here;
    projection = multiply_add(here, unit, projection);
  });
  const auto cols = static_cast<float>(p.cols);
  return {p.is_rms_norm ? 0.0f : sum(total) / cols, sum(projection) / cols};
}

// The gradients of a row's inputs.
template <class T, class R>
static void write_gradients(const NormParams& p, int64_t row, const RowMeans& means,
                            const float* normalised, const float* gradient) {
  const R* dresidual_out = row_of<const R>(p.dresidual_out, row);
  R* dresidual = row_of<R>(p.dresidual, row);
  T* dx = row_of<T>(p.dx, row);
  T* dx1 = row_of<T>(p.dx1, row);
  const T* x = row_of<const T>(p.x, row);
  const Dropout dropout = dropout_of(p, p.mask, row), dropout1 = dropout_of(p, p.mask1, row);
  const float rstd = p.rstd[row], scale = scale_of(p, row);
  Float dscale{};
  for_columns(0, p.cols, [&](int64_t column, int count) __attribute__((always_inline)) {
    Float dz = load(gradient + column) - means.gradient;
    dz = (dz - load(normalised + column) * means.projection) * rstd;
    if (dresidual_out) dz = dz + load_some(dresidual_out + column, count);
    if (dresidual) store_some(dresidual + column, dz, count);
    if (dx1) store_some(dx1 + column, dropout1.apply(dz, column, count), count);
    const Float kept = dropout.apply(dz, column, count);
    if (p.drowscale) dscale = multiply_add(kept, load_some(x + column, count), dscale);
    store_some(dx + column, kept * scale, count);
  });
  if (p.drowscale) p.drowscale[row] = sum(dscale);
}

// ---- Tasks of run_parallel.

constexpr int64_t kNormTaskElements = 1 << 14;  // some microseconds

ANYFLASH_INLINE int64_t norm_rows_per_task(const NormParams& p) {
  return larger<int64_t>(1, kNormTaskElements / p.cols);
}

template <class T>
static void norm_rows(void* params, int64_t task, char* scratch) {
  const auto& p = *static_cast<const NormParams*>(params);
  const int64_t begin = task * norm_rows_per_task(p);
  const int64_t end = smaller(p.rows, begin + norm_rows_per_task(p));
  for (int64_t row = begin; row < end; ++row)
    norm_row<T>(p, row, reinterpret_cast<float*>(scratch));
}

// The part of the workspace that belongs to a chunk.
ANYFLASH_INLINE WeightSums sums_of_chunk(const NormParams& p, int64_t chunk) {
  const int64_t padded = norm_padded_cols(p.cols);
  float* next = p.workspace + chunk * norm_sums(p) * padded;
  const auto take = [&](const float* wanted) {
    float* taken = wanted ? next : nullptr;
    if (wanted) next += padded;
    return taken;
  };
  float* const dweight = take(p.dweight);
  float* const dbias = take(p.dbias);
  float* const dweight1 = take(p.dweight1);
  return {dweight, dbias, dweight1, take(p.dbias1)};
}

template <class T>
static void norm_gradient_rows(void* params, int64_t chunk, char* scratch) {
  const auto& p = *static_cast<const NormParams*>(params);
  const int64_t padded = norm_padded_cols(p.cols);
  auto* normalised = reinterpret_cast<float*>(scratch);
  float* gradient = normalised + padded;
  const WeightSums sums = sums_of_chunk(p, chunk);
  memset(sums.dweight, 0, static_cast<size_t>(norm_sums(p) * padded) * sizeof(float));
  const int64_t begin = chunk * norm_chunk_rows(p.rows);
  const int64_t end = smaller(p.rows, begin + norm_chunk_rows(p.rows));
  for (int64_t row = begin; row < end; ++row) {
    with_storage(p.sum_dtype, [&](auto r) {
      using R = decltype(r);
      RowMeans means{};
      with_storage(p.out_dtype, [&](auto y) {
        means = differentiate_row<R, decltype(y)>(p, row, sums, normalised, gradient);
      });
      write_gradients<T, R>(p, row, means, normalised, gradient);
    });
  }
}

constexpr int64_t kNormSumColumns = 512;

// The gradients of some columns of the weights, from the sums of all chunks.
[[maybe_unused]] static void sum_norm_chunks(void* params, int64_t task, char*) {
  const auto& p = *static_cast<const NormParams*>(params);
  const int64_t chunks = norm_chunks(p.rows), stride = norm_sums(p) * norm_padded_cols(p.cols);
  const int64_t begin = task * kNormSumColumns, end = smaller(p.cols, begin + kNormSumColumns);
  const WeightSums first = sums_of_chunk(p, 0);
  const auto total = [&](const float* sums, float* gradient) {
    if (gradient == nullptr) return;
    for_columns(begin, end, [&](int64_t column, int count) __attribute__((always_inline)) {
      Float here{};
      for (int64_t i = 0; i < chunks; ++i) here = here + load(sums + i * stride + column);
      store_some(gradient + column, here, count);
    });
  };
  total(first.dweight, p.dweight);
  total(first.dbias, p.dbias);
  total(first.dweight1, p.dweight1);
  total(first.dbias1, p.dbias1);
}

// ---- The instances.

template <class T>
ANYFLASH_INLINE int32_t norm_forward(const void* params, void* stream) {
  const auto& p = *static_cast<const NormParams*>(params);
  if (p.rows == 0) return 0;
  const int64_t rows_per_task = norm_rows_per_task(p);
  const int64_t tasks = (p.rows + rows_per_task - 1) / rows_per_task;
  const auto scratch = norm_padded_cols(p.cols) * static_cast<int64_t>(sizeof(float));
  return run_parallel(static_cast<const CpuThreads*>(stream), tasks, tasks, scratch, norm_rows<T>,
                      const_cast<void*>(params));
}

template <class T>
ANYFLASH_INLINE int32_t norm_backward(const void* params, void* stream) {
  const auto& p = *static_cast<const NormParams*>(params);
  if (p.rows == 0) return 0;
  const auto* threads = static_cast<const CpuThreads*>(stream);
  void* context = const_cast<void*>(params);
  const int64_t max_threads = larger<int64_t>(1, p.rows * p.cols / kNormTaskElements);
  const auto scratch = 2 * norm_padded_cols(p.cols) * static_cast<int64_t>(sizeof(float));
  const int32_t error = run_parallel(threads, max_threads, norm_chunks(p.rows), scratch,
                                     norm_gradient_rows<T>, context);
  if (error != 0) return error;
  const int64_t sums = norm_chunks(p.rows) * norm_sums(p) * norm_padded_cols(p.cols);
  return run_parallel(threads, larger<int64_t>(1, sums / kNormTaskElements),
                      (p.cols + kNormSumColumns - 1) / kNormSumColumns, 0, sum_norm_chunks,
                      context);
}

}  // namespace anyflash::cpu::ANYFLASH_ISA
