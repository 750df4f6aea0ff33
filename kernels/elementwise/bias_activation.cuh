// y = activation(x + bias) and its gradients. Bound by memory: 16-byte accesses, two rows of every
// operand in flight per thread, bias and its gradient in registers.
//
// A block of 8 warps works on kTileCols columns. Warps take rows in turn, lanes neighbouring
// 16-byte packs of columns, so a thread keeps its columns from row to row. The bias gradient is
// summed per thread, then over the block's warps into one row of the workspace (one row per
// blockIdx.y), then over those rows by a second kernel: a fixed order, hence the same bits in every
// run.
#pragma once

#include "kernels/common/launch_kernel.h"
#include "kernels/common/ptx.cuh"
#include "kernels/elementwise/bias_activation_shape.h"
#include "kernels/launch.h"
#include "kernels/params.h"

namespace anyflash {
namespace bias_activation {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kLanes * kWarps;
constexpr int kRowsPerThread = 2;
constexpr int kTileRows = kWarps * kRowsPerThread;

template <typename T>
constexpr int kPack = 16 / sizeof(T);  // elements of one thread in one row

template <typename T>
constexpr int kTileCols = kLanes * kPack<T>;

// ---- activations ----

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kTwoSqrt2OverPi = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float kGeluCubic = 0.044715f;
constexpr float kSqrtHalf = 0.7071067811865476f;
constexpr float kInvSqrt2Pi = 0.3989422804014327f;

__device__ __forceinline__ float sigmoid(float z) { return ptx::rcp(1.f + ptx::ex2(-kLog2E * z)); }

// a(z), for silu_gate the gate's.
template <Activation kActivation>
__device__ __forceinline__ float activate(float z) {
  if constexpr (kActivation == Activation::gelu_tanh) {
    // (1 + tanh(t)) / 2 = sigmoid(2t)
    return z * sigmoid(kTwoSqrt2OverPi * (z + kGeluCubic * z * z * z));
  } else if constexpr (kActivation == Activation::gelu_erf) {
    return 0.5f * z * (1.f + erff(kSqrtHalf * z));
  } else if constexpr (kActivation == Activation::relu) {
    return z < 0.f ? 0.f : z;  // keeps NaN
  } else if constexpr (kActivation == Activation::squared_relu) {
    return z < 0.f ? 0.f : z * z;
  } else {
    return z * sigmoid(z);
  }
}

// da/dz
template <Activation kActivation>
__device__ __forceinline__ float slope(float z) {
  if constexpr (kActivation == Activation::gelu_tanh) {
    const float s = sigmoid(kTwoSqrt2OverPi * (z + kGeluCubic * z * z * z));
    return s + z * s * (1.f - s) * kTwoSqrt2OverPi * (1.f + 3.f * kGeluCubic * z * z);
  } else if constexpr (kActivation == Activation::gelu_erf) {
    return 0.5f * (1.f + erff(kSqrtHalf * z)) + z * kInvSqrt2Pi * ptx::ex2(-0.5f * kLog2E * z * z);
  } else if constexpr (kActivation == Activation::relu) {
    return z <= 0.f ? 0.f : 1.f;
  } else if constexpr (kActivation == Activation::squared_relu) {
    return z <= 0.f ? 0.f : 2.f * z;
  } else {
    const float s = sigmoid(z);
    return s * (1.f + z * (1.f - s));
  }
}

// ---- one thread's elements of a row ----

template <typename T>
union Pack {
  Words16 words;
  T values[kPack<T>];
};

// The columns of a thread: kPack neighbours where 16-byte accesses are possible, else every 32nd,
// so that a warp's accesses still join.
template <typename T, bool kVectorised>
struct Columns {
  int64_t first;
  int64_t cols;

  __device__ __forceinline__ static int offset(int i) { return kVectorised ? i : i * kLanes; }
  __device__ __forceinline__ static int first_in_tile(int lane) {
    return kVectorised ? lane * kPack<T> : lane;
  }

  __device__ __forceinline__ bool has(int i) const { return first + offset(i) < cols; }

  __device__ __forceinline__ Pack<T> load(const T* row) const {
    Pack<T> pack{};
    if (kVectorised && has(kPack<T> - 1)) {
      pack.words = ptx::load_16(row + first);
      return pack;
    }
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (has(i)) pack.values[i] = row[first + offset(i)];
    }
    return pack;
  }

  __device__ __forceinline__ void store(T* row, const Pack<T>& pack) const {
    if (kVectorised && has(kPack<T> - 1)) {
      ptx::store_16(row + first, pack.words);
      return;
    }
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (has(i)) row[first + offset(i)] = pack.values[i];
    }
  }

  __device__ __forceinline__ void load_bias(const void* bias, int64_t begin,
                                            float (&values)[kPack<T>]) const {
    const Pack<T> pack = bias ? load(static_cast<const T*>(bias) + begin) : Pack<T>{};
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) values[i] = to_fp32(pack.values[i]);
  }
};

// ---- kernels ----

// Grid: (column tiles, at most row tiles).
template <typename T, Activation kActivation, bool kVectorised>
__global__ void __launch_bounds__(kThreads) forward_kernel(BiasActivationParams p) {
  constexpr bool kGated = kActivation == Activation::silu_gate;
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  using Cols = Columns<T, kVectorised>;
  const Cols columns{int64_t{blockIdx.x} * kTileCols<T> + Cols::first_in_tile(lane), p.cols};

  float bias[kPack<T>];  // of u, or of the only half
  float gate_bias[kPack<T>];
  columns.load_bias(p.bias, 0, bias);
  if constexpr (kGated) columns.load_bias(p.bias, p.cols, gate_bias);

  for (int64_t tile = int64_t{blockIdx.y} * kTileRows; tile < p.rows;
       tile += int64_t{gridDim.y} * kTileRows) {
    Pack<T> x[kRowsPerThread];
    Pack<T> gate[kRowsPerThread];
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int64_t row = tile + r * kWarps + warp;
      if (row >= p.rows) continue;
      const T* x_row = static_cast<const T*>(p.x) + row * p.x_row_stride;
      x[r] = columns.load(x_row);
      if constexpr (kGated) gate[r] = columns.load(x_row + p.cols);
    }
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int64_t row = tile + r * kWarps + warp;
      if (row >= p.rows) continue;
      Pack<T> y;
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        const float z = to_fp32(x[r].values[i]) + bias[i];
        if constexpr (kGated) {
          from_fp32(z * activate<kActivation>(to_fp32(gate[r].values[i]) + gate_bias[i]),
                    y.values[i]);
        } else {
          from_fp32(activate<kActivation>(z), y.values[i]);
        }
      }
      columns.store(static_cast<T*>(p.y) + row * p.y_row_stride, y);
    }
  }
}

// Adds the warps' sums of one tile of columns into a row of the workspace. Called by all threads of
// a block.
template <typename T, bool kVectorised>
__device__ __forceinline__ void store_partial(const float (&sum)[kPack<T>], int64_t cols,
                                              float* partial) {
  __shared__ float sums[kWarps][kTileCols<T>];
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  using Cols = Columns<T, kVectorised>;
  __syncthreads();  // an earlier call may still read
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i)
    sums[warp][Cols::first_in_tile(lane) + Cols::offset(i)] = sum[i];
  __syncthreads();
  const int64_t col = int64_t{blockIdx.x} * kTileCols<T> + threadIdx.x;
  if (threadIdx.x >= kTileCols<T> || col >= cols) return;
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += sums[w][threadIdx.x];
  partial[col] = total;
}

// Grid: (column tiles, rows of the workspace). Writes dx and, if dbias is wanted, the workspace:
// (gridDim.y, in_cols) fp32.
template <typename T, Activation kActivation, bool kVectorised>
__global__ void __launch_bounds__(kThreads) backward_kernel(BiasActivationParams p) {
  constexpr bool kGated = kActivation == Activation::silu_gate;
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  using Cols = Columns<T, kVectorised>;
  const Cols columns{int64_t{blockIdx.x} * kTileCols<T> + Cols::first_in_tile(lane), p.cols};

  float bias[kPack<T>];
  float gate_bias[kPack<T>];
  columns.load_bias(p.bias, 0, bias);
  if constexpr (kGated) columns.load_bias(p.bias, p.cols, gate_bias);
  float dbias[kPack<T>] = {};
  float dgate_bias[kPack<T>] = {};

  for (int64_t tile = int64_t{blockIdx.y} * kTileRows; tile < p.rows;
       tile += int64_t{gridDim.y} * kTileRows) {
    Pack<T> dy[kRowsPerThread];
    Pack<T> x[kRowsPerThread];
    Pack<T> gate[kRowsPerThread];
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int64_t row = tile + r * kWarps + warp;
      if (row >= p.rows) continue;
      const T* x_row = static_cast<const T*>(p.x) + row * p.x_row_stride;
      dy[r] = columns.load(static_cast<const T*>(p.dy) + row * p.dy_row_stride);
      x[r] = columns.load(x_row);
      if constexpr (kGated) gate[r] = columns.load(x_row + p.cols);
    }
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int64_t row = tile + r * kWarps + warp;
      if (row >= p.rows) continue;
      Pack<T> dx;
      Pack<T> dgate;
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        const float dy_i = to_fp32(dy[r].values[i]);
        const float z = to_fp32(x[r].values[i]) + bias[i];
        float dz;
        if constexpr (kGated) {
          const float g = to_fp32(gate[r].values[i]) + gate_bias[i];
          dz = dy_i * activate<kActivation>(g);
          const float dg = dy_i * z * slope<kActivation>(g);
          from_fp32(dg, dgate.values[i]);
          dgate_bias[i] += dg;
        } else {
          dz = dy_i * slope<kActivation>(z);
        }
        from_fp32(dz, dx.values[i]);
        dbias[i] += dz;
      }
      T* dx_row = static_cast<T*>(p.dx) + row * p.dx_row_stride;
      columns.store(dx_row, dx);
      if constexpr (kGated) columns.store(dx_row + p.cols, dgate);
    }
  }

  if (!p.dbias) return;
  float* partial = static_cast<float*>(p.workspace) + blockIdx.y * (kGated ? 2 * p.cols : p.cols);
  store_partial<T, kVectorised>(dbias, p.cols, partial);
  if constexpr (kGated) store_partial<T, kVectorised>(dgate_bias, p.cols, partial + p.cols);
}

struct SumParams {
  const float* partials;  // (num_partials, cols)
  void* sum;              // (cols)
  int64_t num_partials;
  int64_t cols;
};

// Grid: (tiles of 32 columns, 1).
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_partials_kernel(SumParams p) {
  __shared__ float sums[kWarps][kLanes];
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  const int64_t col = int64_t{blockIdx.x} * kLanes + lane;
  float sum = 0.f;
  if (col < p.cols) {
    for (int64_t i = warp; i < p.num_partials; i += kWarps) sum += p.partials[i * p.cols + col];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || col >= p.cols) return;
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += sums[w][lane];
  from_fp32(total, static_cast<T*>(p.sum)[col]);
}

// ---- launchers ----

using Kernel = void (*)(BiasActivationParams);

// kernels.template get<activation>(), or null for a number that is no activation.
template <typename Kernels>
Kernel kernel_for(Activation activation, Kernels kernels) {
  switch (activation) {
    case Activation::gelu_tanh:
      return kernels.template get<Activation::gelu_tanh>();
    case Activation::gelu_erf:
      return kernels.template get<Activation::gelu_erf>();
    case Activation::relu:
      return kernels.template get<Activation::relu>();
    case Activation::squared_relu:
      return kernels.template get<Activation::squared_relu>();
    case Activation::silu_gate:
      return kernels.template get<Activation::silu_gate>();
  }
  return nullptr;
}

template <typename T, bool kVectorised>
struct ForwardKernels {
  template <Activation kActivation>
  Kernel get() const {
    return forward_kernel<T, kActivation, kVectorised>;
  }
};

template <typename T, bool kVectorised>
struct BackwardKernels {
  template <Activation kActivation>
  Kernel get() const {
    return backward_kernel<T, kActivation, kVectorised>;
  }
};

// 16-byte accesses need every row of the operand, and its second half if it has one, to start at a
// multiple of 16 bytes.
template <typename T>
bool rows_aligned(const void* pointer, int64_t row_stride, int64_t second_half) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && row_stride % kPack<T> == 0 &&
         second_half % kPack<T> == 0;
}

template <typename T>
int32_t launch_forward(const BiasActivationParams& p, void* stream) {
  if (p.rows == 0 || p.cols == 0) return 0;
  const int64_t second_half = p.activation == Activation::silu_gate ? p.cols : 0;
  const bool vectorised = rows_aligned<T>(p.x, p.x_row_stride, second_half) &&
                          rows_aligned<T>(p.bias, 0, second_half) &&
                          rows_aligned<T>(p.y, p.y_row_stride, 0);
  const Kernel kernel = vectorised ? kernel_for(p.activation, ForwardKernels<T, true>{})
                                   : kernel_for(p.activation, ForwardKernels<T, false>{});
  if (!kernel) return kErrorInvalidParams;
  constexpr int64_t kMostBlocks = 65535;  // along y
  const int64_t row_tiles = ceil_div(p.rows, kTileRows);
  const Grid grid{uint32_t(ceil_div(p.cols, kTileCols<T>)),
                  uint32_t(row_tiles < kMostBlocks ? row_tiles : kMostBlocks), kThreads};
  return launch_kernel(kernel, grid, p, stream);
}

template <typename T>
int32_t launch_backward(const BiasActivationParams& p, void* stream) {
  if (p.cols == 0) return 0;
  const bool gated = p.activation == Activation::silu_gate;
  const int64_t second_half = gated ? p.cols : 0;
  const bool vectorised = rows_aligned<T>(p.x, p.x_row_stride, second_half) &&
                          rows_aligned<T>(p.bias, 0, second_half) &&
                          rows_aligned<T>(p.dy, p.dy_row_stride, 0) &&
                          rows_aligned<T>(p.dx, p.dx_row_stride, second_half);
  const Kernel kernel = vectorised ? kernel_for(p.activation, BackwardKernels<T, true>{})
                                   : kernel_for(p.activation, BackwardKernels<T, false>{});
  if (!kernel) return kErrorInvalidParams;
  const int64_t partials = num_partials(p.rows, p.cols);
  if (partials > 0) {
    const Grid grid{uint32_t(ceil_div(p.cols, kTileCols<T>)), uint32_t(partials), kThreads};
    if (const int32_t error = launch_kernel(kernel, grid, p, stream)) return error;
  }
  if (!p.dbias) return 0;
  const int64_t in_cols = gated ? 2 * p.cols : p.cols;
  const SumParams sum{static_cast<const float*>(p.workspace), p.dbias, partials, in_cols};
  return launch_kernel(sum_partials_kernel<T>,
                       Grid{uint32_t(ceil_div(in_cols, kLanes)), 1, kThreads}, sum, stream);
}

}  // namespace bias_activation
}  // namespace anyflash
