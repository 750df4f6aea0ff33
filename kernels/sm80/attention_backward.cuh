// From a backward call to launches.
#pragma once

#include "kernels/sm80/attention_forward.cuh"
#include "kernels/sm80/backward_far_rows.cuh"
#include "kernels/sm80/backward_keys.cuh"
#include "kernels/sm80/backward_plan.h"
#include "kernels/sm80/backward_queries.cuh"

namespace anyflash::sm80 {

inline bool is_valid_backward(const AttentionParams& p, int32_t max_head_dim) {
  return is_valid(p, max_head_dim) && !p.block_table && is_aligned(p.dout) && is_aligned(p.dq) &&
         is_aligned(p.dk) && is_aligned(p.dv);
}

// As in the forward; but the slope of a softcap follows from the score only if ALiBi is not in it.
inline Extras backward_extras_of(const AttentionParams& p) {
  return p.softcap > 0 && p.alibi_slopes ? Extras::all : extras_of(p);
}

inline BackwardArguments backward_arguments(const AttentionParams& p, const BackwardPlan& plan) {
  BackwardArguments a{};
  a.attention = p;
  a.score = score_arguments(p);
  a.group = Divisor::of(1);
  a.splits = 1;
  a.padded_rows = plan.row_tiles * kRowTile;
  auto* memory = static_cast<char*>(p.workspace);
  const auto take = [&](int64_t bytes, bool wanted) {
    void* taken = wanted ? memory : nullptr;
    memory += bytes;
    return taken;
  };
  a.rows = static_cast<RowNumbers*>(take(plan.rows_bytes(), true));
  a.references = static_cast<float*>(take(plan.references_bytes(), plan.bias));
  a.dq_sums = static_cast<float*>(take(plan.sums_bytes(), plan.head_dim > 0));
  a.dsinks_parts = static_cast<float*>(take(0, plan.sinks));
  return a;
}

// Blocks in an order that lets those at work share what half of the L2 cache holds: `rows` rows of
// head_dim and head_dim_v columns to a pair.
inline BlockOrder backward_order(const AttentionParams& p, int64_t tiles, int64_t pairs,
                                 int64_t rows) {
  const DeviceLimits limits = device_limits();
  const int64_t bytes = 2 * (p.head_dim + p.head_dim_v) * larger<int64_t>(rows, 1);
  return BlockOrder::of(tiles, pairs, limits.multiprocessors, limits.l2_bytes / 2 / bytes);
}

// One block per place of the order.
inline int32_t launch_ordered(void (*kernel)(BackwardArguments), BackwardArguments a, int64_t tiles,
                              int64_t pairs, int64_t rows, int32_t threads, int32_t shared_bytes,
                              void* stream) {
  if (tiles * pairs == 0) return 0;
  if (tiles * pairs > 0x7FFFFFFF) return kErrorInvalidParams;
  a.order = backward_order(a.attention, tiles, pairs, rows);
  return launch_kernel(kernel,
                       Grid{uint32_t(tiles * pairs), 1, uint32_t(threads), uint32_t(shared_bytes)},
                       a, stream);
}

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras, int32_t kSharedKb>
int32_t launch_keys(BackwardArguments a, void* stream) {
  using Tile = KeyTile<T, kHeadDim, kHeadDimV, kExtras, kSharedKb>;
  const AttentionParams& p = a.attention;
  a.q_tile_bytes = 2 * p.q.row_stride * Tile::kRows;
  a.dout_tile_bytes = 2 * p.dout.row_stride * Tile::kRows;
  return launch_ordered(
      keys_kernel<T, kHeadDim, kHeadDimV, kExtras, kSharedKb>, a, key_tiles_of(p, Tile::kKeys),
      p.cu_seqlens_k ? p.heads_k : p.heads_k * p.batch, p.seqlen_q * (p.heads / p.heads_k),
      kBackwardThreads, Tile::kSharedBytes, stream);
}

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras, int32_t kSharedKb>
int32_t launch_queries(BackwardArguments a, void* stream) {
  using Tile = QueryTile<T, kHeadDim, kHeadDimV, kExtras, kSharedKb>;
  const AttentionParams& p = a.attention;
  a.k_tile_bytes = 2 * p.k.row_stride * Tile::kShape.keys;
  a.v_tile_bytes = 2 * p.v.row_stride * Tile::kShape.keys;
  return launch_ordered(queries_kernel<T, kHeadDim, kHeadDimV, kExtras, kSharedKb>, a,
                        row_tiles_of(p, 1, Tile::kShape.rows),
                        p.cu_seqlens_q ? p.heads : p.heads * p.batch, p.seqlen_k, Tile::kThreads,
                        Tile::kSharedBytes, stream);
}

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras, int32_t kSharedKb>
int32_t launch_gradients(const BackwardArguments& a, const BackwardPlan& plan, void* stream) {
  using Sums = QuerySums<kHeadDim, kSharedKb>;
  const AttentionParams& p = a.attention;
  if (const int32_t error =
          launch_ordered(prepare_kernel<T, kHeadDim, kHeadDimV>, a, plan.row_tiles, plan.pairs, 0,
                         kBackwardThreads, 0, stream)) {
    return error;
  }
  if constexpr (kExtras == Extras::all) {
    if (a.references) {
      if (const int32_t error = launch_ordered(far_rows_kernel<T>, a, plan.row_tiles, plan.pairs,
                                               p.seqlen_k, kBackwardThreads, 0, stream)) {
        return error;
      }
    }
  }
  if (p.dsinks) {
    const Grid grid{uint32_t(p.heads), 1, kWarpThreads};
    if (const int32_t error = launch_kernel(sinks_kernel<T>, grid, a, stream)) return error;
  }
  if (const int32_t error = launch_keys<T, kHeadDim, kHeadDimV, kExtras, kSharedKb>(a, stream)) {
    return error;
  }
  if constexpr (kSharedKb >= kLeastSharedKb) {
    if (a.dq_sums) {
      return launch_ordered(finish_kernel<T, kHeadDim, kSharedKb>, a, plan.row_tiles, plan.pairs, 0,
                            Sums::kThreads, Sums::kSharedBytes, stream);
    }
  }
  constexpr Extras kQueryExtras = kExtras == Extras::none ? Extras::none : Extras::all;
  constexpr int32_t kQuerySharedKb = smaller(kSharedKb, kLeastSharedKb);
  return launch_queries<T, kHeadDim, kHeadDimV, kQueryExtras, kQuerySharedKb>(a, stream);
}

// The largest tile for which the device has the shared memory; Extras::all has one.
template <typename T, int32_t kHeadDim, int32_t kHeadDimV, int32_t kLeastSm, Extras kExtras>
int32_t launch_extras(const BackwardArguments& a, const BackwardPlan& plan, void* stream) {
  if constexpr (kLeastSm < 80) {
    return launch_gradients<T, kHeadDim, kHeadDimV, kExtras, kSm75SharedKb>(a, plan, stream);
  } else {
    constexpr int32_t kMostKb = key_tile_shape(kHeadDim, 1024).shared_kb;
    if constexpr (kExtras != Extras::all && kMostKb > kLeastSharedKb) {
      if (device_limits().shared_bytes_per_multiprocessor >= kMostKb * 1024) {
        return launch_gradients<T, kHeadDim, kHeadDimV, kExtras, kMostKb>(a, plan, stream);
      }
    }
    return launch_gradients<T, kHeadDim, kHeadDimV, kExtras, kLeastSharedKb>(a, plan, stream);
  }
}

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, int32_t kLeastSm = 80>
int32_t launch_backward_of(const AttentionParams& p, int32_t max_head_dim, void* stream) {
  const BackwardPlan plan = backward_plan_of(p, kLeastSm, max_head_dim);
  if (plan.workspace_bytes() > 0 && !p.workspace) return kErrorInvalidParams;
  const BackwardArguments a = backward_arguments(p, plan);
  switch (backward_extras_of(p)) {
    case Extras::none:
      return launch_extras<T, kHeadDim, kHeadDimV, kLeastSm, Extras::none>(a, plan, stream);
    case Extras::score_mod:
      return launch_extras<T, kHeadDim, kHeadDimV, kLeastSm, Extras::score_mod>(a, plan, stream);
    case Extras::dropout:
      return launch_extras<T, kHeadDim, kHeadDimV, kLeastSm, Extras::dropout>(a, plan, stream);
    case Extras::all:
      return launch_extras<T, kHeadDim, kHeadDimV, kLeastSm, Extras::all>(a, plan, stream);
  }
  return kErrorInvalidParams;
}

template <typename T, int32_t kMaxHeadDim>
int32_t launch_backward(const AttentionParams& p, void* stream) {
  if (!is_valid_backward(p, kMaxHeadDim)) return kErrorInvalidParams;
  if constexpr (kMaxHeadDim == 192) {
    if (p.head_dim_v <= 128) return launch_backward_of<T, 192, 128>(p, kMaxHeadDim, stream);
  }
  return launch_backward_of<T, kMaxHeadDim, kMaxHeadDim>(p, kMaxHeadDim, stream);
}

}  // namespace anyflash::sm80
