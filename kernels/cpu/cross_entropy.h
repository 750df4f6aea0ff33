// Cross entropy over rows of logits: one pass for the log-sum-exp with a running maximum, one for
// the gradient. Long rows are cut into chunks, short ones share a task.
#pragma once

#include "kernels/cpu/simd.h"
#include "kernels/cpu/work.h"
#include "kernels/cross_entropy_params.h"
#include "kernels/launch.h"

namespace anyflash::cpu::ANYFLASH_ISA {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// What some columns of a row add to its sums.
struct SoftmaxPart {
  float largest;  // logit
  float sum;      // of exp(logit_scale * (logit - largest))
  float total;    // of the logits, for label smoothing
};

// A part without a finite logit is summed from 0: -inf - -inf is no number.
ANYFLASH_INLINE Float finite_reference(Float largest) {
  return select(largest == broadcast(-kInfinity), Float{}, largest);
}
ANYFLASH_INLINE float finite_reference(float largest) {
  return largest == -kInfinity ? 0.0f : largest;
}

// ---- Sums over columns.

// SoftmaxPart of every lane.
struct SoftmaxLanes {
  Float largest = broadcast(-kInfinity);
  Float sum{};
  Float total{};

  // Moves the reference to the new largest logits, if there are any.
  __attribute__((always_inline)) void raise(Float candidate, Float log2_scale) {
    const Float before = largest;
    largest = maximum(largest, candidate);
    sum = sum * exp2<6>((before - finite_reference(largest)) * log2_scale);
  }
  __attribute__((always_inline)) void add(Float x, Float reference, Float log2_scale) {
    sum = sum + exp2<6>((x - reference) * log2_scale);
  }
};

constexpr int kBlockVectors = 16;  // one rescaling for as many

template <bool kTotal, class T>
ANYFLASH_INLINE void add_block(SoftmaxLanes& lanes, const T* x, Float log2_scale) {
  Float largest[4];
  for (int i = 0; i < 4; ++i) largest[i] = load(x + i * kLanes);
  for (int i = 4; i < kBlockVectors; ++i) {
    largest[i % 4] = maximum(largest[i % 4], load(x + i * kLanes));
  }
  lanes.raise(maximum(maximum(largest[0], largest[1]), maximum(largest[2], largest[3])),
              log2_scale);
  const Float reference = finite_reference(lanes.largest);
  for (int i = 0; i < kBlockVectors; ++i) {
    const Float here = load(x + i * kLanes);
    lanes.add(here, reference, log2_scale);
    if (kTotal) lanes.total = lanes.total + here;
  }
}

template <bool kTotal, class T>
ANYFLASH_INLINE void add_some_columns(SoftmaxLanes& lanes, const T* x, int count,
                                      Float log2_scale) {
  Int lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const Float here = load_some(x, count);
  const Float visible = select(lane < broadcast(count), here, broadcast(-kInfinity));
  lanes.raise(visible, log2_scale);
  lanes.add(visible, finite_reference(lanes.largest), log2_scale);
  if (kTotal) lanes.total = lanes.total + here;
}

template <bool kTotal, class T>
ANYFLASH_INLINE SoftmaxPart softmax_part(const T* x, int64_t count, float logit_scale) {
  constexpr int kBlock = kBlockVectors * kLanes;
  const Float log2_scale = broadcast(logit_scale * kLog2E);
  SoftmaxLanes lanes;
  int64_t column = 0;
  for (; column + kBlock <= count; column += kBlock) {
    add_block<kTotal>(lanes, x + column, log2_scale);
  }
  for (; column < count; column += kLanes) {
    const auto rest = static_cast<int>(smaller<int64_t>(kLanes, count - column));
    add_some_columns<kTotal>(lanes, x + column, rest, log2_scale);
  }
  const float largest = largest_lane(lanes.largest);
  lanes.raise(broadcast(largest), log2_scale);
  return {largest, sum(lanes.sum), sum(lanes.total)};
}

// ---- A row's results.

ANYFLASH_INLINE float log_sum_exp(const SoftmaxPart* parts, int64_t count, float logit_scale) {
  float largest = parts[0].largest, total = 0;
  for (int64_t i = 1; i < count; ++i) largest = larger(largest, parts[i].largest);
  const float reference = finite_reference(largest);
  for (int64_t i = 0; i < count; ++i) {
    const float log2_weight = (parts[i].largest - reference) * (logit_scale * kLog2E);
    total += parts[i].sum * exp2<6>(broadcast(log2_weight))[0];
  }
  if (total == 0) return -kInfinity;
  return logit_scale * largest + kLn2 * log2(broadcast(total))[0];
}

template <class T>
ANYFLASH_INLINE void finish_loss(const CrossEntropyParams& p, int64_t row, const SoftmaxPart* parts,
                                 int64_t count) {
  const float lse = p.given_lse ? p.given_lse[row] : log_sum_exp(parts, count, p.logit_scale);
  float loss = 0, z_loss = 0;
  if (p.labels[row] != p.ignore_index) {
    const float reference = p.vocab < p.total_classes ? 0.0f : lse;
    const int64_t label = p.labels[row] - p.class_start;
    if (label >= 0 && label < p.vocab) {
      const T* x = static_cast<const T*>(p.logits) + row * p.logits_row_stride + label;
      loss = (1 - p.smoothing) * (reference - p.logit_scale * load_some(x, 1)[0]);
    }
    if (p.smoothing > 0) {
      float total = 0;
      for (int64_t i = 0; i < count; ++i) total += parts[i].total;
      const float mean = p.logit_scale * total / static_cast<float>(p.total_classes);
      loss += p.smoothing * (reference - mean);
    }
    z_loss = p.lse_square_scale * reference * reference;
    loss += z_loss;
  }
  p.lse[row] = lse;
  p.losses[row] = loss;
  p.z_losses[row] = z_loss;
}

// ---- Tasks of run_parallel: some columns of one row, or some whole rows.

struct CrossEntropyTask {
  int64_t row_begin, row_end;
  int64_t begin, end;  // columns
};

ANYFLASH_INLINE int64_t rows_per_task(const CrossEntropyParams& p) {
  return larger<int64_t>(1, cross_entropy::kChunk / p.vocab);
}

ANYFLASH_INLINE int64_t num_tasks(const CrossEntropyParams& p) {
  const int64_t blocks = (p.rows + rows_per_task(p) - 1) / rows_per_task(p);
  return blocks * cross_entropy::num_chunks(p.vocab);
}

ANYFLASH_INLINE CrossEntropyTask task_at(const CrossEntropyParams& p, int64_t index) {
  const int64_t chunks = cross_entropy::num_chunks(p.vocab);
  const int64_t row = index / chunks * rows_per_task(p);
  const int64_t begin = index % chunks * cross_entropy::kChunk;
  return {row, smaller(p.rows, row + rows_per_task(p)), begin,
          smaller(p.vocab, begin + cross_entropy::kChunk)};
}

template <class T, bool kTotal>
static void sum_logits(void* params, int64_t index, char*) {
  const auto& p = *static_cast<const CrossEntropyParams*>(params);
  const CrossEntropyTask task = task_at(p, index);
  for (int64_t row = task.row_begin; row < task.row_end; ++row) {
    const T* x = static_cast<const T*>(p.logits) + row * p.logits_row_stride + task.begin;
    const SoftmaxPart part = softmax_part<kTotal>(x, task.end - task.begin, p.logit_scale);
    if (p.workspace == nullptr) {
      finish_loss<T>(p, row, &part, 1);
    } else {
      reinterpret_cast<SoftmaxPart*>(p.workspace)[index] = part;
    }
  }
}

constexpr int64_t kFinishedRows = 256;

template <class T>
static void finish_losses(void* params, int64_t task, char*) {
  const auto& p = *static_cast<const CrossEntropyParams*>(params);
  const int64_t chunks = p.workspace ? cross_entropy::num_chunks(p.vocab) : 0;
  const int64_t begin = task * kFinishedRows, end = smaller(p.rows, begin + kFinishedRows);
  for (int64_t row = begin; row < end; ++row) {
    finish_loss<T>(p, row, reinterpret_cast<SoftmaxPart*>(p.workspace) + row * chunks, chunks);
  }
}

// One row's gradient in [begin, end). The label's column is read first, since dlogits may be
// logits.
template <class T>
ANYFLASH_INLINE void dlogits_columns(const CrossEntropyParams& p, int64_t row, int64_t begin,
                                     int64_t end) {
  const T* x = static_cast<const T*>(p.logits) + row * p.logits_row_stride;
  T* dx = static_cast<T*>(p.dlogits) + row * p.dlogits_row_stride;
  if (p.labels[row] == p.ignore_index) {
    memset(dx + begin, 0, static_cast<size_t>(end - begin) * sizeof(T));
    return;
  }
  const float lse = p.given_lse[row];
  const float dloss = p.dlosses[row * p.dlosses_stride] * p.logit_scale;
  const float uniform = p.smoothing / static_cast<float>(p.total_classes);
  const Float weight = broadcast(1 + 2 * p.lse_square_scale * lse);
  const auto slope = [&](int64_t column, int count) __attribute__((always_inline)) {
    const Float z = load_some(x + column, count) * p.logit_scale - lse;
    return multiply_add(exp2<6>(z * kLog2E), weight, broadcast(-uniform));
  };
  const int64_t label = p.labels[row] - p.class_start;
  const bool label_here = label >= begin && label < end;
  const Float at_label = label_here ? slope(label, 1) - (1 - p.smoothing) : Float{};
  for_columns(begin, end, [&](int64_t column, int count) __attribute__((always_inline)) {
    store_some(dx + column, slope(column, count) * dloss, count);
  });
  if (label_here) store_some(dx + label, at_label * dloss, 1);
}

template <class T>
static void write_dlogits(void* params, int64_t index, char*) {
  const auto& p = *static_cast<const CrossEntropyParams*>(params);
  const CrossEntropyTask task = task_at(p, index);
  for (int64_t row = task.row_begin; row < task.row_end; ++row) {
    dlogits_columns<T>(p, row, task.begin, task.end);
  }
}

// ---- The instances.

template <class T>
ANYFLASH_INLINE int32_t cross_entropy_forward(const void* params, void* stream) {
  const auto& p = *static_cast<const CrossEntropyParams*>(params);
  if (p.rows == 0 || p.vocab == 0) return 0;
  const auto* threads = static_cast<const CpuThreads*>(stream);
  void* context = const_cast<void*>(params);
  const bool needs_total = p.smoothing > 0;
  const bool needs_sums = p.given_lse == nullptr || needs_total;
  if (needs_sums) {
    const int64_t tasks = num_tasks(p);
    const int32_t error =
        run_parallel(threads, tasks, tasks, 0,
                     needs_total ? sum_logits<T, true> : sum_logits<T, false>, context);
    if (error != 0 || p.workspace == nullptr) return error;
  }
  const int64_t blocks = (p.rows + kFinishedRows - 1) / kFinishedRows;
  return run_parallel(threads, blocks, blocks, 0, finish_losses<T>, context);
}

template <class T>
ANYFLASH_INLINE int32_t cross_entropy_backward(const void* params, void* stream) {
  const auto& p = *static_cast<const CrossEntropyParams*>(params);
  if (p.rows == 0 || p.vocab == 0) return 0;
  const int64_t tasks = num_tasks(p);
  return run_parallel(static_cast<const CpuThreads*>(stream), tasks, tasks, 0, write_dlogits<T>,
                      const_cast<void*>(params));
}

}  // namespace anyflash::cpu::ANYFLASH_ISA
