// What calls on a CPU are cut into, without running them: whether many threads would have enough to
// do, by simulation, and how much memory each takes. A program of its own: it holds the kernels
// themselves, and plays their planner's door (run) to get at their tables.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <queue>
#include <string>
#include <vector>

#include "catch.h"
#include "kernels/arch.h"
#include "kernels/cpu/backward_work.h"
#include "kernels/cpu/forward_work.h"

namespace anyflash {

#define ATTENTION(arch, direction, dtype, max_head_dim, ...)                             \
  int32_t attention_##direction##_##dtype##_d##max_head_dim##_##arch(const void* params, \
                                                                     void* stream);
#include "cpu_attention.def"
#undef ATTENTION

namespace cpu {

static ForwardKernels forward_table;
static BackwardKernels backward_table;

int32_t run(const ForwardKernels& kernels, const AttentionParams&, const CpuThreads*) {
  forward_table = kernels;
  return 0;
}

int32_t run(const BackwardKernels& kernels, const AttentionParams&, const CpuThreads*) {
  backward_table = kernels;
  return 0;
}

}  // namespace cpu
}  // namespace anyflash

using namespace anyflash;
using namespace anyflash::cpu;

namespace {

constexpr int64_t kThreads[] = {1, 2, 8, 16, 64, 128};

struct Kernels {
  std::string name;
  ForwardKernels forward;
  BackwardKernels backward;
};

// Those that this CPU runs: their tables are made by code of its instruction set.
std::vector<Kernels> kernels_here() {
  struct Entry {
    Arch arch;
    std::string direction, dtype;
    int32_t (*run)(const void*, void*);
  };
  const Entry entries[] = {
#define ATTENTION(arch_name, direction, dtype, max_head_dim, ...) \
  {arch::arch_name, #direction, #dtype,                           \
   attention_##direction##_##dtype##_d##max_head_dim##_##arch_name},
#include "cpu_attention.def"
#undef ATTENTION
  };
  std::vector<Kernels> found;
  const AttentionParams none{};
  for (const Entry& forward : entries) {
    if (forward.direction != "forward" || !forward.arch.runs_on(anyflash_cpu_isa())) continue;
    forward.run(&none, nullptr);
    for (const Entry& backward : entries) {
      if (backward.direction == "backward" && backward.dtype == forward.dtype &&
          std::strcmp(backward.arch.name, forward.arch.name) == 0) {
        backward.run(&none, nullptr);
      }
    }
    // Other dtypes of an instruction set are planned alike.
    const bool known = std::any_of(found.begin(), found.end(), [](const Kernels& other) {
      return other.forward.decode_rows == forward_table.decode_rows &&
             other.backward.panel_rows == backward_table.panel_rows &&
             other.backward.block_keys == backward_table.block_keys;
    });
    if (known) continue;
    found.push_back({forward.dtype + " " + forward.arch.name, forward_table, backward_table});
  }
  if (found.empty()) WARN("skipped: no attention kernel for this CPU");
  return found;
}

// A call; tensors have no memory.
struct Call {
  std::string name;
  AttentionParams p{};
  std::vector<int32_t> cu_seqlens;

  Call(int64_t batch, int64_t heads, int64_t heads_k, int64_t seqlen_q, int64_t seqlen_k,
       int64_t head_dim, int64_t window_left, int64_t window_right) {
    p.batch = batch, p.heads = heads, p.heads_k = heads_k;
    p.seqlen_q = seqlen_q, p.seqlen_k = seqlen_k;
    p.head_dim = p.head_dim_v = head_dim;
    p.window_left = window_left, p.window_right = window_right;
    p.softmax_scale = 1;
    p.k.row_stride = p.v.row_stride = heads_k * head_dim;
    p.k.head_stride = p.v.head_stride = head_dim;
    name = "b" + std::to_string(batch) + " h" + std::to_string(heads) + "/" +
           std::to_string(heads_k) + " q" + std::to_string(seqlen_q) + " k" +
           std::to_string(seqlen_k) + " d" + std::to_string(head_dim) +
           (window_left >= 0    ? " window"
            : window_right == 0 ? " causal"
                                : " full");
  }

  Call(const std::vector<int32_t>& lengths, int64_t heads, int64_t heads_k, int64_t window_right)
      : Call(static_cast<int64_t>(lengths.size()), heads, heads_k, 0, 0, 64, -1, window_right) {
    cu_seqlens.push_back(0);
    for (const int32_t length : lengths) cu_seqlens.push_back(cu_seqlens.back() + length);
    name += " packed";
  }

  const AttentionParams& params() {
    if (!cu_seqlens.empty()) p.cu_seqlens_q = p.cu_seqlens_k = cu_seqlens.data();
    return p;
  }
};

// ---- What things cost, in multiplications of one number by another.

// Converting a key and its value for an item costs as much as multiplying them with so many rows:
// measured, 128 rows at a time instead of 256 cost a twentieth of the speed, 64 a tenth more.
constexpr int64_t kConversion = 12;
// In decode reading them does, and an item begins and ends in the time that reading some keys takes
// (measured: items of 128 keys instead of 4096 cost a fifteenth of the speed).
constexpr int64_t kReading = 16, kBeginning = 8;
// A number of q or dout that becomes part of a panel of the backward, in both its forms: measured,
// chunks of 96 keys instead of 384 cost a tenth.
constexpr int64_t kPanelLoad = 32;
// A float that is loaded, transposed, stored or added up somewhere.
constexpr int64_t kTouch = 4;
// Taking an item, finding its place: some tenths of a microsecond.
constexpr int64_t kItem = 1 << 15;
// A float of a part: written to memory, later read from there and weighted (measured: together less
// than a nanosecond).
constexpr int64_t kWritten = 16, kWeighted = 32;

constexpr int64_t kPanelRows = 64;  // of the widest kernels

int64_t decode_cost(const AttentionParams& p, const Item& item, int64_t keys) {
  const int64_t of_a_key = std::max(item.row_end - item.row_begin, kReading);
  return item.num_spaces * keys * (p.head_dim + p.head_dim_v) * of_a_key;
}

int64_t forward_cost(const AttentionParams& p, const RowSpace& rows, const Item& item,
                     bool decode) {
  const int64_t columns = p.head_dim + p.head_dim_v;
  const int64_t count = item.row_end - item.row_begin;
  const int64_t keys = std::max<int64_t>(0, item.key_end - item.key_begin);
  int64_t cost = kItem + count * item.num_spaces * columns * kTouch;
  if (item.partial != nullptr) cost += count * item.num_spaces * partial_row_floats(p) * kWritten;
  if (decode) return cost + decode_cost(p, item, keys + kBeginning);
  cost += keys * columns * kConversion;
  const Sequence sequence(p, item.sequence);
  for (int64_t row = item.row_begin; row < item.row_end; row += kPanelRows) {
    const int64_t end = std::min(item.row_end, row + kPanelRows);
    const TileRange<int64_t> seen = rows.keys(sequence.mask, row, end);
    const int64_t visible = std::min(seen.end, item.key_end) - std::max(seen.begin, item.key_begin);
    cost += round_up_to(end - row, 16) * std::max<int64_t>(0, visible) * columns;
  }
  return cost;
}

// ---- The simulation: items in order, each begun by whichever thread is free first.

class Clock {
 public:
  explicit Clock(int64_t threads) {
    for (int64_t i = 0; i < threads; ++i) free_.push(0);
  }
  int64_t begin() {
    const int64_t now = free_.top();
    free_.pop();
    return now;
  }
  void end(int64_t now) {
    free_.push(now);
    last_ = std::max(last_, now);
  }
  int64_t last() const { return last_; }

 private:
  std::priority_queue<int64_t, std::vector<int64_t>, std::greater<int64_t>> free_;
  int64_t last_ = 0;
};

int64_t in_order(const std::vector<int64_t>& costs, int64_t threads) {
  Clock clock(threads);
  for (const int64_t cost : costs) clock.end(clock.begin() + cost);
  return clock.last();
}

// A thread has enough to do if its part of the work is worth 512 wakings of a thread: more than
// a millisecond of fp32 products of AVX-512. Below that finer cuts would take from calls on one
// thread what they give to those on a hundred. Where reading keys is the work cuts are cheaper, and
// enough is a sixteenth of that, if it is also 20 times what its beginning and combining its part
// cost.
constexpr int64_t kEnough = 512 * kWorthAThread, kReaders = 16, kTimesAPart = 20;

class Forward {
 public:
  Forward(const Kernels& kernels, const AttentionParams& p)
      : p_(p), plan_(kernels.forward, p), rows_{p.heads / p.heads_k} {
    std::vector<const ForwardWork::Work*> of_sequence(static_cast<size_t>(p.batch));
    for (const ForwardWork::Work& w : plan_.items()) {
      static float somewhere;
      Item item = w.item;
      if (w.workspace >= 0) item.partial = &somewhere;
      items_.push_back(forward_cost(p, rows_, item, w.decode));
      of_sequence[static_cast<size_t>(item.sequence)] = &w;
    }
    for (const ForwardWork::Rest& rest : plan_.combinations()) {
      const Combination& c = rest.combination;
      const int64_t rows = c.item.row_end - c.item.row_begin;
      combinations_.push_back(kItem / 8 + c.splits * rows * partial_row_floats(p) * kWeighted);
    }
    // The same uncut: all keys for an item's rows.
    for (const ForwardWork::Work* w : of_sequence) {
      if (w == nullptr) continue;
      Item item = w->item;
      const Sequence sequence(p, item.sequence);
      const int64_t rows = sequence.mask.seqlen_q * rows_.heads;
      const int64_t spaces = p.heads_k / item.num_spaces;
      for (int64_t row = 0; row < rows; row += kernels.forward.item_rows) {
        item.row_begin = row;
        item.row_end = std::min(rows, row + kernels.forward.item_rows);
        const TileRange<int64_t> keys = rows_.keys(sequence.mask, row, item.row_end);
        item.key_begin = keys.begin, item.key_end = keys.end;
        const int64_t cost = forward_cost(p, rows_, item, w->decode);
        work_ += spaces * cost;
        const int64_t conversion =
            (keys.end - keys.begin) * (p.head_dim + p.head_dim_v) * kConversion;
        const bool reads = w->decode || item.row_end - row <= kPanelRows;
        int64_t part =
            (item.row_end - row) * item.num_spaces * partial_row_floats(p) * (kWritten + kWeighted);
        if (w->decode) part += decode_cost(p, item, kBeginning);
        const int64_t enough = reads ? std::max(kEnough / kReaders, kTimesAPart * part) : kEnough;
        const int64_t counted = reads ? cost : cost - conversion;
        threads_ += static_cast<double>(spaces * counted) / static_cast<double>(enough);
      }
    }
  }

  const ForwardWork& plan() const { return plan_; }
  int64_t work() const { return work_; }
  bool enough_for(int64_t threads) const { return threads_ >= static_cast<double>(threads); }
  // Under a mask items are uneven: one call of the grid is a hair below.
  double demanded() const {
    return p_.window_left >= 0 || (p_.window_right >= 0 && p_.seqlen_q > 4) ? 0.89 : 0.9;
  }
  int64_t makespan(int64_t threads) const {
    return in_order(items_, threads) + in_order(combinations_, threads);
  }

 private:
  const AttentionParams& p_;
  ForwardWork plan_;
  RowSpace rows_;
  std::vector<int64_t> items_, combinations_;
  int64_t work_ = 0;
  double threads_ = 0;  // with enough to do
};

class Backward {
 public:
  Backward(const Kernels& kernels, const AttentionParams& p)
      : kernels_(kernels.backward), p_(p), plan_(kernels_, p), rows_{p.heads / p.heads_k} {
    const int64_t most = kernels_.max_chunk_keys(p);
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence sequence(p, b);
      for (int64_t query = 0; query < sequence.mask.seqlen_q; query += 64) {
        const int64_t count = std::min<int64_t>(64, sequence.mask.seqlen_q - query);
        deltas_.push_back(count * p.heads * p.head_dim_v * kTouch);
        work_ += deltas_.back();
      }
      work_ += p.heads_k * sequence.mask.seqlen_k * columns() * kConversion;
      shortest_chunk_ = std::max(shortest_chunk_, most / 2 * all_rows(sequence) * of_a_row());
      for (int64_t panel = 0; panel < panels(sequence); ++panel) {
        const TileRange<int64_t> seen = seen_by(sequence, panel);
        const int64_t keys = std::max<int64_t>(0, seen.end - seen.begin);
        products_ += p.heads_k * rows_in(sequence, panel) * keys * of_a_row();
        work_ += p.heads_k * ceil_div(keys, most) * load(sequence, panel);
      }
    }
    work_ += products_;
  }

  const BackwardWork& plan() const { return plan_; }
  int64_t work() const { return work_; }
  // And eight of the shortest chunks: nothing is cut finer than a chunk, and chunks of a head begin
  // in the order of their keys, not the longest of all heads first.
  bool enough_for(int64_t threads) const {
    return products_ >= threads * std::max(kEnough, 8 * shortest_chunk_);
  }

  // Nobody overtakes the chunk before: under a mask a chunk that has less to do with a panel waits,
  // and so does the last of few chunks, which may be shorter.
  double demanded() const {
    const bool masked = p_.window_left >= 0 || p_.window_right >= 0;
    return masked || p_.seqlen_k < 1024 ? 0.75 : 0.9;
  }

  // Chunks of a key head add to dq in turn. They come after each other in the plan, so what an item
  // waits for has been simulated before.
  int64_t makespan(int64_t threads) const {
    Clock clock(threads);
    std::vector<int64_t> passed;  // of the panels: when the last turn was done
    for (const BackwardItem& item : plan_.items()) {
      const Sequence sequence(p_, item.sequence);
      const int64_t count = panels(sequence);
      if (static_cast<int64_t>(passed.size()) < item.first_panel + count) {
        passed.resize(static_cast<size_t>(item.first_panel + count));
      }
      int64_t now = clock.begin() + kItem;
      now += (item.key_end - item.key_begin) * columns() * kConversion;
      for (int64_t panel = count - 1; panel >= 0; --panel) {
        const TileRange<int64_t> seen = seen_by(sequence, panel);
        const int64_t begin = std::max(item.key_begin, seen.begin);
        const int64_t keys = std::min(item.key_end, seen.end) - begin;
        if (keys <= 0) continue;
        const int64_t rows = rows_in(sequence, panel);
        const int64_t before_dq = rows * std::min(keys, kernels_.block_keys) * columns();
        const bool first = seen.begin / item.chunk_keys == item.key_begin / item.chunk_keys;
        const bool last = seen.end <= item.key_end;
        int64_t& turn = passed[static_cast<size_t>(item.first_panel + panel)];
        now += load(sequence, panel) + before_dq;
        if (last && !first) now = std::max(now, turn);
        now += rows * keys * of_a_row() - before_dq;
        if (!last && !first) now = std::max(now, turn) + plan_.panel_floats() * kTouch;
        turn = now;
      }
      clock.end(now);
    }
    return in_order(deltas_, threads) + clock.last();
  }

 private:
  int64_t columns() const { return p_.head_dim + p_.head_dim_v; }
  int64_t of_a_row() const { return 3 * p_.head_dim + 2 * p_.head_dim_v; }
  int64_t all_rows(const Sequence& sequence) const { return sequence.mask.seqlen_q * rows_.heads; }
  int64_t panels(const Sequence& sequence) const {
    return ceil_div(all_rows(sequence), kernels_.panel_rows);
  }
  int64_t rows_in(const Sequence& sequence, int64_t panel) const {
    return std::min(kernels_.panel_rows, all_rows(sequence) - panel * kernels_.panel_rows);
  }
  TileRange<int64_t> seen_by(const Sequence& sequence, int64_t panel) const {
    const int64_t row = panel * kernels_.panel_rows;
    return rows_.keys(sequence.mask, row, row + rows_in(sequence, panel));
  }
  int64_t load(const Sequence& sequence, int64_t panel) const {
    return rows_in(sequence, panel) * columns() * kPanelLoad;
  }

  BackwardKernels kernels_;
  const AttentionParams& p_;
  BackwardWork plan_;
  RowSpace rows_;
  std::vector<int64_t> deltas_;
  int64_t work_ = 0, products_ = 0, shortest_chunk_ = 0;
};

template <class Direction>
double efficiency(const Direction& call, int64_t threads) {
  return static_cast<double>(call.work()) / static_cast<double>(threads) /
         static_cast<double>(call.makespan(threads));
}

std::vector<Call> dense_calls() {
  std::vector<Call> calls;
  for (const int64_t length : {128, 256, 512, 1024, 2048, 4096, 8192, 32768}) {
    for (const int64_t batch : {1, 2, 4, 8, 16}) {
      if (length * batch > 32768) continue;
      for (const auto& [heads, heads_k] : {std::pair{8, 8}, {32, 32}, {32, 8}}) {
        for (const int64_t head_dim : {64, 128}) {
          calls.emplace_back(batch, heads, heads_k, length, length, head_dim, -1, -1);
          calls.emplace_back(batch, heads, heads_k, length, length, head_dim, -1, 0);
          calls.emplace_back(batch, heads, heads_k, length, length, head_dim, 512, 0);
        }
      }
    }
  }
  const std::vector<int32_t> uneven[] = {
      {1024, 64, 480, 32, 736, 128, 320, 896, 96, 192, 608, 256, 1000, 48, 800, 416},
      {8192, 1024, 300, 200, 100, 50, 40, 30},
      {4096, 4096, 17, 2048, 1000},
      {16000, 1}};
  for (const std::vector<int32_t>& lengths : uneven) {
    for (const auto& [heads, heads_k] : {std::pair{8, 8}, {32, 32}, {32, 8}}) {
      calls.emplace_back(lengths, heads, heads_k, -1);
      calls.emplace_back(lengths, heads, heads_k, 0);
    }
  }
  return calls;
}

std::vector<Call> decode_calls() {
  std::vector<Call> calls;
  for (const int64_t queries : {1, 4}) {
    for (const int64_t batch : {1, 2, 4, 8, 16}) {
      for (const int64_t keys : {1024, 2048, 4096, 8192, 16384, 32768}) {
        for (const int64_t heads_k : {8, 32}) {
          calls.emplace_back(batch, 32, heads_k, queries, keys, 128, -1, 0);
        }
      }
    }
  }
  return calls;
}

template <class Direction>
void demand_busy_threads(std::vector<Call> calls) {
  for (const Kernels& kernels : kernels_here()) {
    for (Call& call : calls) {
      const Direction planned(kernels, call.params());
      for (const int64_t threads : kThreads) {
        if (!planned.enough_for(threads)) break;
        CAPTURE(kernels.name, call.name, threads, planned.plan().items().size());
        CHECK(efficiency(planned, threads) >= planned.demanded());
      }
    }
  }
}

}  // namespace

TEST_CASE("cpu plan: 128 threads are busy in the forward", "[cpu_plan]") {
  demand_busy_threads<Forward>(dense_calls());
}

TEST_CASE("cpu plan: 128 threads are busy in decode", "[cpu_plan]") {
  demand_busy_threads<Forward>(decode_calls());
}

TEST_CASE("cpu plan: 128 threads are busy in the backward", "[cpu_plan]") {
  demand_busy_threads<Backward>(dense_calls());
}

TEST_CASE("cpu plan: a thread's scratch memory is what docs/kernels/cpu.md says", "[cpu_plan]") {
  constexpr int64_t kKiB = 1024;
  struct Limit {
    int64_t head_dim, forward, backward, forward_amx, backward_amx;
  };
  for (const Kernels& kernels : kernels_here()) {
    const bool amx = kernels.name == "bf16 amx";
    for (const Limit& limit : {Limit{64, 250, 700, 290, 810},
                               {128, 440, 780, 470, 1370},
                               {256, 830, 1410, 840, 2490},
                               {512, 1600, 2690, 1600, 4730}}) {
      const int64_t forward = kKiB * (amx ? limit.forward_amx : limit.forward);
      const int64_t backward = kKiB * (amx ? limit.backward_amx : limit.backward);
      for (const int64_t length : {1, 128, 32768}) {
        for (const double dropout : {0.0, 0.5}) {
          Call call(1, 8, 8, length, length, limit.head_dim, -1, 0);
          call.p.dropout_p = dropout;
          CAPTURE(kernels.name, call.name, dropout);
          CHECK(ForwardWork(kernels.forward, call.params()).scratch_bytes() <= forward);
          CHECK(BackwardWork(kernels.backward, call.params()).scratch_bytes() <= backward);
        }
      }
    }
  }
}

TEST_CASE("cpu plan: parts of the output are small beside the tensors", "[cpu_plan]") {
  for (const Kernels& kernels : kernels_here()) {
    for (Call& call : decode_calls()) {
      const AttentionParams& p = call.params();
      const int64_t keys = p.batch * p.heads_k * p.seqlen_k * (p.head_dim + p.head_dim_v);
      CAPTURE(kernels.name, call.name);
      CHECK(50 * ForwardWork(kernels.forward, p).workspace_floats() <= keys);
    }
    for (Call& call : dense_calls()) {
      const AttentionParams& p = call.params();
      if (p.cu_seqlens_q != nullptr) continue;
      const int64_t out = p.batch * p.heads * p.seqlen_q * p.head_dim_v;
      CAPTURE(kernels.name, call.name);
      CHECK(ForwardWork(kernels.forward, p).workspace_floats() <= 4 * out);
    }
  }
}

TEST_CASE("cpu plan: items hold all keys, combinations all parts", "[cpu_plan]") {
  for (const Kernels& kernels : kernels_here()) {
    for (std::vector<Call> calls : {dense_calls(), decode_calls()}) {
      for (Call& call : calls) {
        const AttentionParams& p = call.params();
        if (p.batch > 2 || p.seqlen_k > 8192) continue;
        const ForwardWork plan(kernels.forward, p);
        int64_t of_items = 0, of_call = 0, in_parts = 0, combined = 0;
        for (const ForwardWork::Work& w : plan.items()) {
          const int64_t rows = (w.item.row_end - w.item.row_begin) * w.item.num_spaces;
          of_items += rows * std::max<int64_t>(0, w.item.key_end - w.item.key_begin);
          if (w.workspace >= 0) in_parts += rows;
        }
        for (const ForwardWork::Rest& rest : plan.combinations()) {
          const Item& item = rest.combination.item;
          combined += (item.row_end - item.row_begin) * item.num_spaces * rest.combination.splits;
        }
        for (int64_t b = 0; b < p.batch; ++b) {
          const Sequence sequence(p, b);
          for (int64_t query = 0; query < sequence.mask.seqlen_q; ++query) {
            const int64_t end = std::max<int64_t>(0, sequence.mask.kv_end(query));
            of_call += p.heads * std::max<int64_t>(0, end - sequence.mask.kv_begin(query));
          }
        }
        CAPTURE(kernels.name, call.name);
        CHECK(of_items >= of_call);
        CHECK(in_parts == combined);
      }
    }
  }
}

TEST_CASE("cpu plan: the table of docs/kernels/cpu.md", "[.table]") {
  const std::vector<Kernels> all = kernels_here();
  if (all.empty()) return;
  const Kernels& kernels = all.back();
  std::printf("%s\n| call | items |", kernels.name.c_str());
  for (const int64_t threads : kThreads) std::printf(" %d |", static_cast<int>(threads));
  const auto row = [](const Call& call, const char* direction, const auto& planned) {
    std::printf("\n| %s, %s | %d |", call.name.c_str(), direction,
                static_cast<int>(planned.plan().items().size()));
    for (const int64_t threads : kThreads) {
      std::printf(planned.enough_for(threads) ? " %.2f |" : " (%.2f) |",
                  efficiency(planned, threads));
    }
  };
  std::vector<Call> dense, decode;
  for (const auto& [batch, length] :
       {std::pair{1, 1024}, {2, 1024}, {8, 1024}, {1, 4096}, {1, 32768}}) {
    dense.emplace_back(batch, 8, 8, length, length, 64, -1, -1);
    dense.emplace_back(batch, 8, 8, length, length, 64, -1, 0);
  }
  for (const auto& [batch, keys] : {std::pair{1, 8192}, {8, 4096}, {1, 32768}}) {
    decode.emplace_back(batch, 32, 32, 1, keys, 128, -1, -1);
    decode.emplace_back(batch, 32, 8, 1, keys, 128, -1, -1);
    decode.emplace_back(batch, 32, 8, 4, keys, 128, -1, 0);
  }
  for (Call& call : dense) row(call, "forward", Forward(kernels, call.params()));
  for (Call& call : dense) row(call, "backward", Backward(kernels, call.params()));
  for (Call& call : decode) row(call, "decode", Forward(kernels, call.params()));
  std::printf("\n");
}
