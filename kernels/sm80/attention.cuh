// From a call to launches: which kernel of the sm_80 family takes it, with which arguments.
#pragma once

#include "kernels/sm80/decode.cuh"
#include "kernels/sm80/forward.cuh"

#if !defined(__CUDACC_RTC__)  // host code from here on

#include "kernels/common/launch_kernel.h"
#include "kernels/launch.h"

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
         is_aligned(p.out) && p.bias_type == BiasType::none;
}

// The cheapest kernel that has what the call needs. The plain one takes its maxima before it
// scales, so the scale must be positive.
inline Extras extras_of(const AttentionParams& p) {
  if (p.dropout_p > 0) return Extras::dropout;
  const bool plain = p.softcap == 0 && !p.alibi_slopes && p.softmax_scale > 0;
  return plain ? Extras::none : Extras::score_mod;
}

inline int32_t window(int64_t keys) {
  constexpr int64_t kFar = 1 << 30;  // beyond every sequence, and no sum with a position overflows
  return int32_t(keys < 0 ? -1 : smaller(keys, kFar));
}

inline ScoreArguments score_arguments(const AttentionParams& p, Extras extras) {
  ScoreArguments a{};
  a.scale = float(p.softmax_scale);
  a.softcap = float(p.softcap);
  a.inverse_softcap = p.softcap > 0 ? float(1.0 / p.softcap) : 0.0f;
  a.logit = extras == Extras::none ? a.scale : 1.0f;
  a.exponent = extras == Extras::none ? float(p.softmax_scale * 1.4426950408889634) : kLog2e;
  a.window_left = window(p.window_left);
  a.window_right = window(p.window_right);
  a.alibi_by_key = p.window_left < 0 && p.window_right == 0;
  if (p.dropout_p > 0) a.dropout_threshold = Dropout::threshold_for(p.dropout_p);
  a.keep_scale = float(1.0 / (1.0 - p.dropout_p));
  return a;
}

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras, bool kPaged>
int32_t launch_tiles(const AttentionParams& p, void* stream) {
  using Tile = ForwardTile<T, kHeadDim, kHeadDimV, kExtras, kPaged>;
  const int64_t row_tiles = ceil_div(p.seqlen_q, Tile::kShape.rows);
  const int64_t blocks = row_tiles * p.heads * p.batch;
  if (blocks == 0) return 0;
  if (blocks > 0x7FFFFFFF) return kErrorInvalidParams;
  const ForwardArguments arguments{p, score_arguments(p, kExtras), page_size(p),
                                   int32_t(row_tiles)};
  return launch_kernel(forward_kernel<T, kHeadDim, kHeadDimV, kExtras, kPaged>,
                       Grid{uint32_t(blocks), 1, Tile::kThreads, Tile::kSharedBytes}, arguments,
                       stream);
}

// The cheapest kernel that has what the call needs. Of the paged ones there are two: plain, and
// with everything.
template <typename T, int32_t kHeadDim, int32_t kHeadDimV>
int32_t launch_forward_kernel(const AttentionParams& p, void* stream) {
  const Extras extras = extras_of(p);
  if (p.block_table) {
    if (extras == Extras::none) {
      return launch_tiles<T, kHeadDim, kHeadDimV, Extras::none, true>(p, stream);
    }
    return launch_tiles<T, kHeadDim, kHeadDimV, Extras::dropout, true>(p, stream);
  }
  switch (extras) {
    case Extras::none:
      return launch_tiles<T, kHeadDim, kHeadDimV, Extras::none, false>(p, stream);
    case Extras::score_mod:
      return launch_tiles<T, kHeadDim, kHeadDimV, Extras::score_mod, false>(p, stream);
    case Extras::dropout:
      return launch_tiles<T, kHeadDim, kHeadDimV, Extras::dropout, false>(p, stream);
  }
  return kErrorInvalidParams;
}

template <typename T, int32_t kHeadDim, int32_t kHeadDimV, Extras kExtras>
int32_t launch_decode_tiles(const DecodeArguments& arguments, void* stream) {
  using Tile = DecodeTile<T, kHeadDim, kHeadDimV, kExtras>;
  const AttentionParams& p = arguments.attention;
  const int64_t blocks = int64_t{arguments.splits} * arguments.row_tiles * p.heads_k * p.batch;
  if (blocks == 0) return 0;
  if (blocks > 0x7FFFFFFF) return kErrorInvalidParams;
  return launch_kernel(decode_kernel<T, kHeadDim, kHeadDimV, kExtras>,
                       Grid{uint32_t(blocks), 1, Tile::kThreads, Tile::kSharedBytes}, arguments,
                       stream);
}

template <typename T, int32_t kHeadDim, int32_t kHeadDimV>
int32_t launch_decode(const AttentionParams& p, void* stream) {
  const SplitPlan plan = plan_splits(p, device_limits().multiprocessors);
  const Extras extras = extras_of(p);
  DecodeArguments arguments{p,
                            score_arguments(p, extras),
                            page_size(p),
                            Divisor::of(p.heads / p.heads_k),
                            int32_t(plan.row_tiles),
                            int32_t(plan.splits),
                            nullptr,
                            nullptr};
  if (plan.splits > 1) {
    if (!p.workspace) return kErrorInvalidParams;
    arguments.part_out = static_cast<float*>(p.workspace);
    arguments.part_lse = arguments.part_out + plan.splits * plan.rows * p.head_dim_v;
  }
  const int32_t error =
      extras == Extras::none
          ? launch_decode_tiles<T, kHeadDim, kHeadDimV, Extras::none>(arguments, stream)
          : launch_decode_tiles<T, kHeadDim, kHeadDimV, Extras::score_mod>(arguments, stream);
  if (error || plan.splits == 1) return error;
  return launch_kernel(
      combine_kernel<T>,
      Grid{uint32_t(ceil_div(plan.rows, kCombineWarps)), 1, kCombineWarps * kWarpThreads},
      arguments, stream);
}

template <typename T, int32_t kHeadDim, int32_t kHeadDimV>
int32_t launch_forward_or_decode(const AttentionParams& p, void* stream) {
  return decodes(p) ? launch_decode<T, kHeadDim, kHeadDimV>(p, stream)
                    : launch_forward_kernel<T, kHeadDim, kHeadDimV>(p, stream);
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

#endif  // !__CUDACC_RTC__
