// An attention problem in words: sizes, lengths, features and how its tensors lie in memory.
// Problem makes tensors of it; the fuzzer draws shapes (random_shape.h), the emulator lists them.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "kernels/params.h"

namespace anyflash::fuzz {

enum class Slopes { none, heads, batch_heads };

enum class Strides {
  contiguous,  // heads inside of rows
  transposed,  // rows inside of heads
  fused,       // q, k and v side by side in each row of one tensor; equal lengths and head dims
  broadcast,   // one key head stored for all
  random,      // each tensor its own way, with gaps
};

using Lengths = std::vector<int32_t>;  // per sequence

struct Shape {
  int64_t batch = 1;
  int64_t heads = 2;
  int64_t heads_k = 2;
  int64_t head_dim = 64;
  int64_t head_dim_v = 64;
  int64_t seqlen_q = 0;  // dense: of every sequence; packed: of the longest, or more
  int64_t seqlen_k = 0;
  std::optional<Lengths> packed_q;  // of the sequences that follow each other
  std::optional<Lengths> packed_k;
  std::optional<Lengths> seqused_k;  // keys in use of those stored
  std::optional<Lengths> leftpad_k;  // keys before the first one in use
  int64_t page_size = 0;             // 0: not paged
  std::optional<Lengths> held_k;     // keys in the pages, as differences of cu_seqlens_k
  int64_t slack = 0;                 // rows behind the last packed sequence
  bool clears_rest = false;          // they are written: total_q and total_k count them

  std::optional<double> softmax_scale;  // 1 / sqrt(head_dim)
  double softcap = 0;
  int64_t window_left = -1;
  int64_t window_right = -1;
  Slopes alibi = Slopes::none;
  bool sinks = false;
  double dropout_p = 0;
  BiasType bias_type = BiasType::none;
  double amplitude = 1;  // of q and k: large ones make probabilities of 0 and 1
  double bias_size = 1;
  std::optional<double> bias_hides;  // how much of it is bias_hidden
  double bias_hidden = -std::numeric_limits<double>::infinity();
  double sink_size = 1;

  Strides strides = Strides::contiguous;
  int64_t alignment = 1;  // rows begin at multiples of so many elements

  bool backward = false;
  bool dlse = false;
  bool dsinks = false;
  bool dbias = false;

  int64_t pages_per_sequence() const { return (seqlen_k + page_size - 1) / page_size; }
};

}  // namespace anyflash::fuzz
