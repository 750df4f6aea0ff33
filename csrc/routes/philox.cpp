#include "routes/philox.h"

#include <cmath>

namespace anyflash {

namespace {

Tensor bit_and(const Tensor& x, int64_t mask) {
  return aten<Tensor>("aten::bitwise_and", "Tensor", x, scalar(mask));
}

Tensor bit_xor(const Tensor& a, const Tensor& b) {
  return aten<Tensor>("aten::bitwise_xor", "Tensor", a, b);
}

Tensor shift_right(const Tensor& x, int64_t bits) {
  return aten<Tensor>("aten::bitwise_right_shift", "Tensor", x, scalar(bits));
}

constexpr int64_t kMask32 = 0xFFFFFFFF;

Tensor low32(const Tensor& x) { return bit_and(x, kMask32); }

Tensor high32(const Tensor& x) { return low32(shift_right(x, 32)); }

// (key + round * increment) mod 2^32
Tensor round_key(const Tensor& key, int64_t round, int64_t increment) {
  return low32(add(key, scalar((round * increment) & kMask32)));
}

Tensor counter(int64_t begin, int64_t count, const Tensor& like) {
  return add(arange(count, like), scalar(begin));
}

int64_t threshold_of(double dropout_p) {
  return std::min<int64_t>(std::llround(dropout_p * 65536), 65535);
}

}  // namespace

DropoutMask::DropoutMask(const AttentionArgs& args)
    : heads_(args.heads()),
      kept_scale_(1 / (1 - args.dropout_p)),
      threshold_(scalar(threshold_of(args.dropout_p))) {
  const Tensor seed = select(*args.rng_state, 0, 0);
  for (int round = 0; round < kRounds; ++round) {
    keys_[round] = {round_key(low32(seed), round, 0x9E3779B9),
                    round_key(high32(seed), round, 0xBB67AE85)};
  }
  offset_ = low32(select(*args.rng_state, 0, 1));
}

// One Philox call gives eight 16-bit numbers, for rows {i, i + 8} x keys {j, j + 1, j + 8, j + 9}
// of a 16 x 16 tile: counters run over (sequence and head, 8 rows of each row tile, 4 key pairs of
// each key tile).
Tensor DropoutMask::dropped(int64_t sequence, int64_t sequences, int64_t row, int64_t rows,
                            int64_t key, int64_t keys) const {
  const int64_t row_tiles = (rows + kTile - 1) / kTile;
  const int64_t key_tiles = (keys + kTile - 1) / kTile;
  const int64_t batch = sequences * heads_;
  std::array<Tensor, 4> words = {
      counter(key / kTile * 4, key_tiles * 4, offset_),
      unsqueeze(counter(row / kTile * 8, row_tiles * 8, offset_), 1),
      unsqueeze(unsqueeze(counter(sequence * heads_, batch, offset_), 1), 1),
      offset_,
  };
  for (const auto& [key0, key1] : keys_) {
    const Tensor product0 = mul(words[0], scalar(int64_t{0xD2511F53}));
    const Tensor product1 = mul(words[2], scalar(int64_t{0xCD9E8D57}));
    words = {bit_xor(bit_xor(high32(product1), words[1]), key0), low32(product1),
             bit_xor(bit_xor(high32(product0), words[3]), key1), low32(product0)};
  }
  // (batch, row tile, row half, row, key tile, key half, key pair, key in pair)
  const Tensor result =
      empty({batch, row_tiles, 2, 8, key_tiles, 2, 4, 2}, offset_, ScalarType::Bool);
  for (int64_t half = 0; half < 8; ++half) {
    const Tensor& word = words[half / 2];
    const Tensor bits = half % 2 == 0 ? bit_and(word, 0xFFFF) : shift_right(word, 16);
    const Tensor below = aten<Tensor>("aten::lt", "Tensor", bits, threshold_);
    const Tensor part = select(select(select(result, 7, half % 2), 5, half / 2 % 2), 2, half / 4);
    copy_(part, split_dim(split_dim(below, 2, 4), 1, 8));
  }
  const int64_t row_stride = key_tiles * kTile;
  return view(result, {batch, rows, keys}, {row_tiles * kTile * row_stride, row_stride, 1});
}

}  // namespace anyflash
