// From a call to launches: which kernel takes it, with which arguments. kLeastSm: 80, or 75 in the
// family of that name.
#pragma once

#include "kernels/common/launch_kernel.h"
#include "kernels/launch.h"
#include "kernels/sm80/decode.cuh"
#include "kernels/sm80/forward.cuh"

namespace anyflash::sm80 {

inline Divisor page_size(const AttentionParams& p) {
  return Divisor::of(p.block_table && p.page_size > 0 ? p.page_size : 1);
}

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Whether every row begins on 16 bytes.
inline bool is_aligned(const Rows& x) {
  return is_aligned(x.data) && x.batch_stride % 8 == 0 && x.row_stride % 8 == 0 &&
         x.head_stride % 8 == 0;
}

inline bool is_valid(const AttentionParams& p, int32_t max_head_dim) {
  return p.heads_k > 0 && p.heads % p.heads_k == 0 && p.head_dim > 0 && p.head_dim_v > 0 &&
         p.head_dim % 8 == 0 && p.head_dim_v % 8 == 0 && p.head_dim <= max_head_dim &&
         p.head_dim_v <= max_head_dim && is_aligned(p.q) && is_aligned(p.k) && is_aligned(p.v) &&
         is_aligned(p.out);
}

// Up to here a softcap is computed as a sigmoid: that is off by less than 1e-4.
constexpr double kLargestSigmoidCap = 256;

// Below this, a unit of scores would take ALiBi's slopes out of range.
constexpr double kSmallestUnit = 0x1p-60;

// The cheapest kernel that has what the call needs. The plain one takes its maxima before it
// scales, so the scale must be positive.
inline Extras extras_of(const AttentionParams& p) {
  if (p.bias) return Extras::all;
  const bool plain = p.softcap == 0 && !p.alibi_slopes && p.softmax_scale > 0;
  if (p.dropout_p > 0) return plain ? Extras::dropout : Extras::all;
  if (p.softcap > kLargestSigmoidCap) return Extras::all;
  return plain ? Extras::none : Extras::score_mod;
}

inline int32_t window(int64_t keys) {
  constexpr int64_t kFar = 1 << 30;  // beyond every sequence, and no sum with a position overflows
  return int32_t(keys < 0 ? -1 : smaller(keys, kFar));
}

inline ScoreArguments score_arguments(const AttentionParams& p) {
  constexpr double kLog2eExact = 1.4426950408889634;
  ScoreArguments a{};
  double unit = 1, factor = 1;
  if (p.softcap > kLargestSigmoidCap) {
    a.softcap = Softcap::tanh;
    a.capped = float(p.softmax_scale / p.softcap);
    unit = p.softcap;
  } else if (p.softcap > 0) {
    a.softcap = Softcap::sigmoid;
    a.capped = float(-2 * kLog2eExact * p.softmax_scale / p.softcap);
    unit = 2 * p.softcap;
    a.origin = float(-p.softcap);
  } else if (!p.bias &&
             (p.softmax_scale >= kSmallestUnit || (p.softmax_scale > 0 && !p.alibi_slopes))) {
    unit = p.softmax_scale;
  } else {
    factor = p.softmax_scale;
  }
  a.factor = float(factor);
  a.unit = float(unit);
  a.inverse_unit = float(1 / unit);
  a.exponent = float(unit * kLog2eExact);
  // With a bias differences to the maximum are multiplied, not scores.
  constexpr float kLargest = 3.402823466e38f;
  a.floor = p.bias ? -kLargest / larger(1.0f, a.unit) : -0.5f * kLargest / larger(1.0f, a.exponent);
  a.window_left = window(p.window_left);
  a.window_right = window(p.window_right);
  a.alibi_by_key = p.window_left < 0 && p.window_right == 0;
  if (p.dropout_p > 0) a.dropout_threshold = Dropout::threshold_for(p.dropout_p);
  a.keep_scale = float(1.0 / (1.0 - p.dropout_p));
  return a;
}

// What a kernel gets whose blocks go on by step_keys keys and of which a multiprocessor holds
// `blocks`.
inline Arguments arguments_of(const AttentionParams& p, const Plan& plan, int32_t step_keys,
                              int32_t blocks) {
  const DeviceLimits limits = device_limits();
  Arguments a{p,
              score_arguments(p),
              page_size(p),
              Divisor::of(plan.group),
              order_of(p, plan, int64_t{blocks} * limits.multiprocessors, limits.l2_bytes),
              2 * p.k.row_stride * step_keys,
              2 * p.v.row_stride * step_keys,
              int32_t(plan.splits),
              nullptr,
              nullptr};
  if (plan.splits > 1) {
    a.part_out = static_cast<float*>(p.workspace);
    a.part_lse = a.part_out + plan.splits * plan.rows * p.head_dim_v;
  }
  return a;
}

// A kernel, and what combines its parts if there are several.
template <typename T, int32_t kLeastSm>
int32_t launch_parts(void (*kernel)(Arguments), const Arguments& arguments, const Plan& plan,
                     int32_t threads, int32_t shared_bytes, void* stream) {
  const int64_t blocks = plan.blocks();
  if (blocks == 0) return 0;
  if (blocks > 0x7FFFFFFF || (plan.splits > 1 && !arguments.part_out)) return kErrorInvalidParams;
  const Grid grid{uint32_t(blocks), 1, uint32_t(threads), uint32_t(shared_bytes)};
  const int32_t error = launch_kernel(kernel, grid, arguments, stream);
  if (error || plan.splits == 1) return error;
  return launch_kernel(
      combine_kernel<T, kLeastSm>,
      Grid{uint32_t(ceil_div(plan.rows, kCombineWarps)), 1, kCombineWarps * kWarpThreads},
      arguments, stream);
}

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras, bool kPaged,
          int32_t kSharedKb>
int32_t launch_shape(const AttentionParams& p, const Plan& plan, void* stream) {
  using Tile = ForwardTile<T, kHeadDim, kHeadDimV, kExtras, kPaged, kSharedKb>;
  constexpr int32_t kLeastSm = kSharedKb < kLeastSharedKb ? 75 : 80;
  static_assert(Tile::kShape.rows == kernels_of(kLeastSm, kHeadDim).forward_rows);
  constexpr int32_t kHeld = smaller(8 / Tile::kShape.warps, kSharedKb * 1024 / Tile::kSharedBytes);
  return launch_parts<T, kLeastSm>(
      forward_kernel<T, kHeadDim, kHeadDimV, kExtras, kPaged, kSharedKb>,
      arguments_of(p, plan, Tile::kShape.keys, kHeld), plan, Tile::kThreads, Tile::kSharedBytes,
      stream);
}

// The largest tile for which the device has the shared memory. Extras::all, which few calls need,
// has one for every device.
template <typename T, int32_t kHeadDim, int32_t kHeadDimV, int32_t kLeastSm, Extras kExtras,
          bool kPaged>
int32_t launch_tiles(const AttentionParams& p, const Plan& plan, void* stream) {
  if constexpr (kLeastSm < 80) {
    return launch_shape<T, kHeadDim, kHeadDimV, kExtras, kPaged, kSm75SharedKb>(p, plan, stream);
  } else {
    constexpr int32_t kMostKb = tile_shape(kHeadDim, 1024).shared_kb;
    if constexpr (kMostKb > kLeastSharedKb && kExtras != Extras::all) {
      if (device_limits().shared_bytes_per_multiprocessor >= kMostKb * 1024) {
        return launch_shape<T, kHeadDim, kHeadDimV, kExtras, kPaged, kMostKb>(p, plan, stream);
      }
    }
    return launch_shape<T, kHeadDim, kHeadDimV, kExtras, kPaged, kLeastSharedKb>(p, plan, stream);
  }
}

// Of the paged kernels there are two: plain, which sm_75 would have no registers for, and with
// everything.
template <typename T, int32_t kHeadDim, int32_t kHeadDimV, int32_t kLeastSm = 80>
int32_t launch_forward_kernel(const AttentionParams& p, const Plan& plan, void* stream) {
  const Extras extras = extras_of(p);
  if (p.block_table) {
    if constexpr (kLeastSm >= 80) {
      if (extras == Extras::none) {
        return launch_tiles<T, kHeadDim, kHeadDimV, kLeastSm, Extras::none, true>(p, plan, stream);
      }
    }
    return launch_tiles<T, kHeadDim, kHeadDimV, kLeastSm, Extras::all, true>(p, plan, stream);
  }
  switch (extras) {
    case Extras::none:
      return launch_tiles<T, kHeadDim, kHeadDimV, kLeastSm, Extras::none, false>(p, plan, stream);
    case Extras::score_mod:
      return launch_tiles<T, kHeadDim, kHeadDimV, kLeastSm, Extras::score_mod, false>(p, plan,
                                                                                      stream);
    case Extras::dropout:
      return launch_tiles<T, kHeadDim, kHeadDimV, kLeastSm, Extras::dropout, false>(p, plan,
                                                                                    stream);
    case Extras::all:
      return launch_tiles<T, kHeadDim, kHeadDimV, kLeastSm, Extras::all, false>(p, plan, stream);
  }
  return kErrorInvalidParams;
}

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras, bool kPaged>
int32_t launch_decode_tiles(const AttentionParams& p, const Plan& plan, void* stream) {
  using Tile = DecodeTile<T, kHeadDim, kHeadDimV, kExtras, kPaged>;
  return launch_parts<T, 80>(
      decode_kernel<T, kHeadDim, kHeadDimV, kExtras, kPaged>,
      arguments_of(p, plan, Tile::kKeys * Tile::kWarps, int32_t(kBlocksPerMultiprocessor)), plan,
      Tile::kThreads, Tile::kSharedBytes, stream);
}

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras>
int32_t launch_decode(const AttentionParams& p, const Plan& plan, void* stream) {
  return p.block_table
             ? launch_decode_tiles<T, kHeadDim, kHeadDimV, kExtras, true>(p, plan, stream)
             : launch_decode_tiles<T, kHeadDim, kHeadDimV, kExtras, false>(p, plan, stream);
}

template <typename T, int32_t kHeadDim, int32_t kHeadDimV>
int32_t launch_forward_or_decode(const AttentionParams& p, void* stream) {
  const Plan plan = plan_of(p, device_limits().multiprocessors);
  if (!plan.decodes) return launch_forward_kernel<T, kHeadDim, kHeadDimV>(p, plan, stream);
  return extras_of(p) == Extras::none
             ? launch_decode<T, kHeadDim, kHeadDimV, Extras::none>(p, plan, stream)
             : launch_decode<T, kHeadDim, kHeadDimV, Extras::score_mod>(p, plan, stream);
}

template <typename T, int32_t kMaxHeadDim>
int32_t launch_forward(const AttentionParams& p, void* stream) {
  if (!is_valid(p, kMaxHeadDim)) return kErrorInvalidParams;
  if constexpr (kMaxHeadDim == 192) {  // the shape of DeepSeek's latent attention
    if (p.head_dim_v <= 128) return launch_forward_or_decode<T, 192, 128>(p, stream);
  }
  return launch_forward_or_decode<T, kMaxHeadDim, kMaxHeadDim>(p, stream);
}

}  // namespace anyflash::sm80
