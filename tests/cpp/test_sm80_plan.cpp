// What the sm_80 launchers decide on the host: tiles, parts, and the order of blocks, whose time on
// a GPU is simulated.
#include <algorithm>
#include <functional>
#include <queue>
#include <set>
#include <string>
#include <vector>

#include "catch.h"
#include "kernels/sm80/backward_plan.h"
#include "kernels/sm80/backward_shapes.h"
#include "kernels/sm80/plan.h"

using namespace anyflash;
using namespace anyflash::sm80;

namespace {

struct Gpu {
  const char* name;
  int32_t multiprocessors;
  int32_t shared_kb;  // of a multiprocessor
  int32_t l2_mb;
};

constexpr Gpu kGpus[] = {
    {"A100", 108, 164, 40}, {"RTX 4090", 128, 100, 72}, {"H100", 132, 228, 50}};

AttentionParams params(int64_t seqlen, int64_t heads, int64_t heads_k, int64_t head_dim) {
  AttentionParams p{};
  p.batch = 1;
  p.heads = heads;
  p.heads_k = heads_k;
  p.head_dim = p.head_dim_v = head_dim;
  p.seqlen_q = p.seqlen_k = seqlen;
  p.softmax_scale = 0.1;
  p.window_left = p.window_right = -1;
  return p;
}

// Blocks that a multiprocessor holds: 8 warps by registers, and what fits its shared memory.
int64_t blocks_held(const TileShape& shape, int64_t shared_kb) {
  const int64_t bytes = 2 * shape.max_head_dim * (shape.rows + 2 * shape.keys) + 2048;
  return std::min<int64_t>(8 / shape.warps, shared_kb * 1024 / bytes);
}

// What a block does before and after its key tiles, in key tiles.
constexpr double kStart = 1.5;

// Part of the slots' time in which they work, if the next block of the grid starts where one ends.
double efficiency(const AttentionParams& p, const Gpu& gpu) {
  const TileShape shape = tile_shape(int32_t(p.head_dim), gpu.shared_kb);
  const Plan plan = plan_of(p, gpu.multiprocessors);
  const int64_t slots = blocks_held(shape, gpu.shared_kb) * gpu.multiprocessors;
  const BlockOrder order = order_of(p, plan, slots, int64_t{gpu.l2_mb} << 20);
  const IntervalMask<int64_t> mask{p.seqlen_q, p.seqlen_k, p.window_left, p.window_right};
  std::priority_queue<double, std::vector<double>, std::greater<double>> ends;
  for (int64_t i = 0; i < slots; ++i) ends.push(0);
  double work = 0, last = 0;
  for (int32_t block = 0; block < plan.row_tiles * plan.pairs; ++block) {
    const int64_t begin = int64_t{order.at(block).row_tile} * shape.rows;
    const int64_t end = std::min<int64_t>(begin + shape.rows, p.seqlen_q);
    const TileRange<int64_t> keys = mask.tiles(begin, end, shape.keys);
    const double time = double(keys.end - keys.begin) + kStart;
    const double done = ends.top() + time;
    ends.pop();
    ends.push(done);
    work += time;
    last = std::max(last, done);
  }
  return work / double(slots) / last;
}

}  // namespace

TEST_CASE("sm80: every block order has every tile once, the last rows first", "[sm80]") {
  for (const int64_t row_tiles : {1, 2, 7, 64}) {
    for (const int64_t pairs : {1, 3, 8, 33}) {
      for (const int64_t slots : {1, 16, 216}) {
        for (const int64_t fitting : {0, 1, 5, 100}) {
          const BlockOrder order = BlockOrder::of(row_tiles, pairs, slots, fitting);
          std::set<std::pair<int32_t, int32_t>> seen;
          for (int32_t block = 0; block < row_tiles * pairs; ++block) {
            const BlockOrder::Place place = order.at(block);
            REQUIRE(place.pair >= 0);
            REQUIRE(place.pair < pairs);
            REQUIRE(place.row_tile >= 0);
            REQUIRE(place.row_tile < row_tiles);
            seen.insert({place.pair, place.row_tile});
          }
          REQUIRE(int64_t(seen.size()) == row_tiles * pairs);
          CHECK(order.at(0).row_tile == row_tiles - 1);
        }
      }
    }
  }
}

TEST_CASE("sm80: under a causal mask a GPU is busy to the end", "[sm80]") {
  const struct {
    int64_t seqlen, heads;
  } kCalls[] = {{4096, 32}, {8192, 16}, {16384, 8}};
  for (const Gpu& gpu : kGpus) {
    for (const auto& call : kCalls) {
      AttentionParams p = params(call.seqlen, call.heads, call.heads, 128);
      p.window_right = 0;
      INFO(gpu.name << ", " << call.seqlen << " x " << call.heads);
      CHECK(efficiency(p, gpu) >= 0.93);
    }
  }
}

TEST_CASE("sm80: eight warps to a multiprocessor, whatever the head_dim", "[sm80]") {
  for (const Gpu& gpu : kGpus) {
    for (const int32_t head_dim : {64, 96, 128, 192, 256}) {
      const TileShape shape = tile_shape(head_dim, gpu.shared_kb);
      INFO(gpu.name << ", head_dim " << head_dim);
      CHECK(blocks_held(shape, gpu.shared_kb) * shape.warps == 8);
      CHECK(shape.rows == kForwardRows);
    }
  }
}

TEST_CASE("sm80: few rows share tiles and the keys are cut", "[sm80]") {
  AttentionParams p = params(16, 32, 4, 128);  // 16 tokens over 8192 keys, 8 heads to a key head
  p.seqlen_k = 8192;
  Plan plan = plan_of(p, 132);
  CHECK_FALSE(plan.decodes);
  CHECK(plan.group == 8);
  CHECK(plan.row_tiles * plan.pairs == 4);  // 128 rows each
  CHECK(plan.splits == 32);                 // of 256 keys
  p.seqlen_q = 2;
  plan = plan_of(p, 132);
  CHECK(plan.decodes);
  CHECK(plan.row_tiles * plan.pairs == 4);

  p.seqlen_q = 8192;  // long queries fill tiles of their own
  plan = plan_of(p, 132);
  CHECK(plan.group == 1);
  CHECK(plan.splits == 1);
  CHECK(plan.workspace_bytes() == 0);

  const float slope = 1;
  p.seqlen_q = 16;
  p.alibi_slopes = &slope;  // a slope belongs to one head
  CHECK(plan_of(p, 132).group == 1);
}

TEST_CASE("sm75: one kernel for few rows and many, tiles by head_dim", "[sm75]") {
  AttentionParams p = params(1, 32, 4, 128);  // one token over 8192 keys, 8 heads to a key head
  p.seqlen_k = 8192;
  Plan plan = plan_of(p, 40, kernels_of(75, 128));
  CHECK_FALSE(plan.decodes);
  CHECK(plan.group == 8);
  CHECK(plan.row_tiles * plan.pairs == 4);
  CHECK(plan.splits == 20);  // 80 blocks
  p.seqlen_q = 8192;
  CHECK(plan_of(p, 40, kernels_of(75, 128)).row_tiles == 64);
  CHECK(plan_of(p, 40, kernels_of(75, 256)).row_tiles == 128);
}

TEST_CASE("sm75: tiles fill the 64 KB of a multiprocessor and no more", "[sm75]") {
  for (const int32_t head_dim : {64, 128, 256}) {
    const TileShape shape = tile_shape(head_dim, kSm75SharedKb);
    const int32_t bytes = 2 * head_dim * (shape.rows + 2 * shape.keys);
    CHECK(bytes == (head_dim == 64 ? 32 : 64) * 1024);
  }
}

TEST_CASE("sm80: a packed grid is bounded by the rows, not by the longest sequence", "[sm80]") {
  const int32_t cu_seqlens[1] = {};
  AttentionParams p = params(8192, 16, 16, 128);
  p.batch = 64;
  p.cu_seqlens_q = p.cu_seqlens_k = cu_seqlens;
  p.total_q = 65536;
  const Plan plan = plan_of(p, 132);
  CHECK(plan.blocks() == (65536 / 128 + 65) * 16);
}

// What one block may have: sm_80 and newer keep 1 KB, and its blocks share 128 bytes of numbers.
int32_t most_tile_bytes(int32_t shared_kb) {
  return shared_kb < kLeastSharedKb ? shared_kb * 1024 : (shared_kb - 1) * 1024 - 128;
}

TEST_CASE("sm80, sm75: tiles of the backward fit, with room for what a block shares", "[sm80]") {
  for (const KeyTileShape& shape : kKeyTileShapes) {
    CAPTURE(shape.max_head_dim, shape.shared_kb);
    const int32_t keys = shape.keys * (shape.v_in_registers ? 1 : 2);
    const int32_t rows = shape.rows * (shape.q_buffers + 1);
    const int32_t bytes = 2 * (shape.max_head_dim * (keys + rows) + 2 * shape.rows * shape.keys);
    CHECK(bytes <= most_tile_bytes(shape.shared_kb));
    for (const int32_t warps : {shape.score_warps, shape.key_warps, shape.query_warps}) {
      CHECK(8 % warps == 0);
    }
    CHECK(kRowTile % shape.rows == 0);
  }
  for (const QueryTileShape& shape : kQueryTileShapes) {
    CAPTURE(shape.max_head_dim, shape.shared_kb);
    const int32_t rows = shape.rows * (shape.q_in_registers ? 1 : 2);
    const int32_t keys = shape.keys * (shape.shared_kb < kLeastSharedKb ? 2 : 3);
    CHECK(2 * shape.max_head_dim * (rows + keys) <= most_tile_bytes(shape.shared_kb));
    CHECK(kRowTile % shape.rows == 0);
  }
}

// What FlashAttention-2 allocates for a while in a backward of equal lengths: delta in fp32 and
// dq's sums by rows rounded to 128, and with grouped heads dk and dv of every query head.
int64_t flash_attention_bytes(const AttentionParams& p) {
  const int64_t rows = ceil_div(p.seqlen_q, 128) * 128 * p.batch * p.heads;
  const int64_t keys = p.heads == p.heads_k ? 0 : p.batch * p.seqlen_k * p.heads;
  return rows * 4 + rows * p.head_dim * 4 + 2 * keys * p.head_dim * 2;
}

TEST_CASE("sm80, sm75: memory of a backward", "[sm80]") {
  for (const int64_t head_dim : {64, 96, 128, 192, 256}) {
    for (const int64_t heads_k : {16, 4, 1}) {
      AttentionParams p = params(4096, 16, heads_k, head_dim);
      CAPTURE(head_dim, heads_k);
      const int64_t ours = backward_plan_of(p, 80, int32_t(head_dim)).workspace_bytes();
      const int64_t rows = p.batch * p.heads * p.seqlen_q;
      CHECK(ours == rows * (8 + 4 * head_dim));
      // 4 bytes per row more, less than nothing where heads share keys.
      CHECK(ours <= flash_attention_bytes(p) + (heads_k == 16 ? 4 * rows : 0));
      CHECK(backward_plan_of(p, 75, int32_t(head_dim)).workspace_bytes() == rows * 8);
      p.deterministic = true;
      CHECK(backward_plan_of(p, 80, int32_t(head_dim)).workspace_bytes() == rows * 8);
      p.bias = &p;
      CHECK(backward_plan_of(p, 80, int32_t(head_dim)).workspace_bytes() == rows * 12);
    }
  }
}
