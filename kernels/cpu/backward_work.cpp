#include "kernels/cpu/backward_work.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>

namespace anyflash::cpu {

struct GradientPanels {
  struct Panel {
    std::atomic<int64_t> turn{0};
    float* sum = nullptr;  // of all turns before
  };

  const std::vector<int64_t>& turns;  // of every panel
  std::unique_ptr<Panel[]> panels;
  int64_t floats;  // of a panel
  std::mutex mutex;
  std::vector<std::unique_ptr<char, Free>> owned;
  std::vector<float*> unused;
  std::unique_ptr<char, Free> last_resort;  // where memory runs out; the call then fails
  std::atomic<bool> out_of_memory{false};

  GradientPanels(const std::vector<int64_t>& turns_of_panels, int64_t panel_floats)
      : turns(turns_of_panels),
        panels(new Panel[turns_of_panels.size()]),
        floats(panel_floats),
        last_resort(allocate()) {
    if (!last_resort) throw std::bad_alloc();
  }

  char* allocate() const {
    return static_cast<char*>(
        std::aligned_alloc(64, static_cast<size_t>(round_up_to(floats * 4, 64))));
  }

  float* take() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (unused.empty()) {
      std::unique_ptr<char, Free> fresh(allocate());
      if (!fresh) {
        out_of_memory = true;
        return reinterpret_cast<float*>(last_resort.get());
      }
      unused.push_back(reinterpret_cast<float*>(fresh.get()));
      owned.push_back(std::move(fresh));
    }
    float* memory = unused.back();
    unused.pop_back();
    return memory;
  }

  void give_back(float* memory) {
    const std::lock_guard<std::mutex> lock(mutex);
    unused.push_back(memory);
  }

  // Whoever is waited for began earlier (run_parallel's order), so this ends.
  float* wait_for_sum(int64_t panel, int64_t turn) {
    const Panel& own = panels[static_cast<size_t>(panel)];
    for (int tries = 0; own.turn.load(std::memory_order_acquire) != turn; ++tries) {
      if (tries > 64) std::this_thread::yield();
    }
    return own.sum;
  }
};

namespace {

// The panel that this thread adds to.
struct Turn {
  int64_t number;
  float* memory;
};
thread_local Turn own_turn;

}  // namespace

float* wait_for_turn(GradientPanels& panels, int64_t panel, int64_t turn) {
  own_turn.number = turn;
  if (turn > 0 && turn + 1 == panels.turns[static_cast<size_t>(panel)]) {
    own_turn.memory = panels.wait_for_sum(panel, turn);
  } else {
    own_turn.memory = panels.take();
    if (turn > 0) std::memset(own_turn.memory, 0, static_cast<size_t>(panels.floats) * 4);
  }
  return own_turn.memory;
}

void pass_on(GradientPanels& panels, int64_t panel, bool last) {
  if (last) return panels.give_back(own_turn.memory);
  if (own_turn.number > 0) {
    float* before = panels.wait_for_sum(panel, own_turn.number);
    // Lanes without a row hold anything, and so does their sum.
    for (int64_t i = 0; i < panels.floats; ++i) own_turn.memory[i] += before[i];
    panels.give_back(before);
  }
  GradientPanels::Panel& own = panels.panels[static_cast<size_t>(panel)];
  own.sum = own_turn.memory;
  own.turn.store(own_turn.number + 1, std::memory_order_release);
}

namespace {

constexpr int64_t kDeltaRows = 64;

// A number of q or dout, taken into a panel in both its forms, costs so many (measured). Short
// chunks take it in more often; those of less than half the most keys would cost a thread a tenth
// of its speed.
constexpr int64_t kPanelLoad = 32;

constexpr int64_t kKeyStep =
    12;  // keys of a chunk are a multiple, rows of the product in registers

template <class T>
int64_t size(const std::vector<T>& list) {
  return static_cast<int64_t>(list.size());
}

}  // namespace

// The chunks of one key head of a sequence.
struct BackwardWork::Chunks {
  int64_t sequence;
  int64_t keys;                 // of a chunk
  std::vector<int64_t> costs;   // of the chunks, in multiplications
  std::vector<int64_t> panels;  // turns of the panels, one per chunk with a key that they see
  int64_t cost;
  int64_t multiplications;  // of the cost, those of the products
};

BackwardWork::BackwardWork(const BackwardKernels& kernels, const AttentionParams& params)
    : kernels_(kernels),
      plan_{&params, {params.dropout_p > 0 ? 1 : params.heads / params.heads_k}, {}, {}, {},
            nullptr} {
  add_queries();
  add_items();
  if (params.dbias != nullptr) add_bias_tiles();
}

BackwardWork::~BackwardWork() = default;

int64_t BackwardWork::panel_floats() const {
  return kernels_.panel_rows * round_up_to(plan_.params->head_dim, 16);
}

int32_t BackwardWork::run(const CpuThreads* threads) {
  const AttentionParams& p = *plan_.params;
  delta_.reset(new float[static_cast<size_t>(num_deltas_)]);
  plan_.delta.data = delta_.get();
  if (some_row_is_far()) add_far_rows();
  panels_ = std::make_unique<GradientPanels>(turns_, panel_floats());
  plan_.panels = panels_.get();

  const auto delta = [](void* self, int64_t i, char*) {
    const auto* work = static_cast<const BackwardWork*>(self);
    const Queries& queries = work->queries_[static_cast<size_t>(i)];
    work->kernels_.delta(work->plan_, queries.sequence, queries.begin, queries.end);
  };
  const int64_t delta_threads = 1 + num_deltas_ * p.head_dim_v / kWorthAThread;
  int32_t error = run_parallel(threads, delta_threads, size(queries_), 0, delta, this);
  if (error != 0) return error;

  if (!far_rows_.empty()) {
    const auto far_rows = [](void* self, int64_t i, char* scratch) {
      const auto* work = static_cast<const BackwardWork*>(self);
      work->kernels_.far_rows(work->plan_, work->far_rows_[static_cast<size_t>(i)], scratch);
    };
    error = run_parallel(threads, size(far_rows_), size(far_rows_),
                         kernels_.far_rows_scratch_bytes(plan_), far_rows, this);
    if (error != 0) return error;
  }

  if (p.dsinks != nullptr) {
    const auto dsink = [](void* self, int64_t head, char*) {
      const auto* work = static_cast<const BackwardWork*>(self);
      work->kernels_.dsink(work->plan_, head);
    };
    error = run_parallel(threads, 1 + num_deltas_ / kWorthAThread, p.heads, 0, dsink, this);
    if (error != 0) return error;
  }

  const int64_t max_threads = 1 + multiplications_ / kWorthAThread;
  const auto backward = [](void* self, int64_t i, char* scratch) {
    const auto* work = static_cast<const BackwardWork*>(self);
    work->kernels_.backward(work->plan_, work->items_[static_cast<size_t>(i)], scratch);
  };
  error = run_parallel(threads, max_threads, size(items_), scratch_bytes(), backward, this);
  if (error != 0) return error;
  if (panels_->out_of_memory) return kErrorNoMemory;

  if (p.dbias == nullptr) return 0;
  const auto dbias = [](void* self, int64_t i, char* scratch) {
    const auto* work = static_cast<const BackwardWork*>(self);
    work->kernels_.dbias(work->plan_, work->bias_tiles_[static_cast<size_t>(i)], scratch);
  };
  return run_parallel(threads, max_threads, size(bias_tiles_), kernels_.bias_scratch_bytes(plan_),
                      dbias, this);
}

// One delta per row, laid out like lse.
void BackwardWork::add_queries() {
  const AttentionParams& p = *plan_.params;
  int64_t rows = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence sequence(p, b);
    rows = std::max(rows, sequence.q_row + sequence.mask.seqlen_q);
    for (int64_t begin = 0; begin < sequence.mask.seqlen_q; begin += kDeltaRows) {
      queries_.push_back({b, begin, std::min(begin + kDeltaRows, sequence.mask.seqlen_q)});
    }
  }
  num_deltas_ = rows * p.heads * (p.cu_seqlens_q ? 1 : p.batch);
  plan_.delta = {nullptr, p.heads * rows, rows};
}

bool BackwardWork::some_row_is_far() const {
  const AttentionParams& p = *plan_.params;
  for (const Queries& queries : queries_) {
    const Sequence sequence(p, queries.sequence);
    for (int64_t head = 0; head < p.heads; ++head) {
      const float* lse = p.lse.data + (p.cu_seqlens_q ? 0 : sequence.index * p.lse.batch_stride) +
                         head * p.lse.head_stride + sequence.q_row;
      if (std::any_of(lse + queries.begin, lse + queries.end, is_far)) return true;
    }
  }
  return false;
}

void BackwardWork::add_far_rows() {
  const AttentionParams& p = *plan_.params;
  far_statistics_.reset(new float[static_cast<size_t>(2 * num_deltas_)]);
  plan_.reference = plan_.remainder = plan_.delta;
  plan_.reference.data = far_statistics_.get();
  plan_.remainder.data = far_statistics_.get() + num_deltas_;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t rows = rows_of(Sequence(p, b));
    for (int64_t space = 0; space < p.heads / plan_.rows.heads; ++space) {
      for (int64_t row = 0; row < rows; row += kernels_.panel_rows) {
        const int64_t end = std::min(rows, row + kernels_.panel_rows);
        far_rows_.push_back({b, space, 1, row, end, 0, 0, nullptr});
      }
    }
  }
}

int64_t BackwardWork::rows_of(const Sequence& sequence) const {
  return std::max<int64_t>(sequence.mask.seqlen_q, 0) * plan_.rows.heads;
}

// Chunks are of about the same size, of at most `largest` keys.
BackwardWork::Chunks BackwardWork::chunks_of(int64_t index, int64_t largest) const {
  const AttentionParams& p = *plan_.params;
  const Sequence sequence(p, index);
  const int64_t keys = sequence.mask.seqlen_k, rows = rows_of(sequence);
  const int64_t spaces = p.heads / p.heads_k / plan_.rows.heads;
  const int64_t count = std::max<int64_t>(1, ceil_div(keys, largest));
  const int64_t chunk =
      std::min(largest, round_up_to(std::max<int64_t>(1, ceil_div(keys, count)), kKeyStep));
  Chunks chunks{index, chunk, {}, {}, 0, 0};
  chunks.costs.resize(static_cast<size_t>(std::max<int64_t>(1, ceil_div(keys, chunk))));
  for (int64_t row = 0; row < rows; row += kernels_.panel_rows) {
    const int64_t end = std::min(rows, row + kernels_.panel_rows);
    const TileRange<int64_t> seen = plan_.rows.keys(sequence.mask, row, end);
    const int64_t of_a_key = spaces * (end - row) * (3 * p.head_dim + 2 * p.head_dim_v);
    const int64_t load = spaces * (end - row) * (p.head_dim + p.head_dim_v) * kPanelLoad;
    chunks.panels.push_back(0);
    int64_t before = 0;
    for (int64_t key = seen.begin; key < seen.end; key = (key / chunk + 1) * chunk) {
      const int64_t until = std::min(seen.end, (key / chunk + 1) * chunk);
      // Nobody overtakes the chunk before.
      before = std::max(before, (until - key) * of_a_key + load);
      chunks.costs[static_cast<size_t>(key / chunk)] += before;
      chunks.cost += before;
      chunks.multiplications += (until - key) * of_a_key;
      ++chunks.panels.back();
    }
  }
  return chunks;
}

// The largest sequences first.
std::vector<BackwardWork::Chunks> BackwardWork::all_chunks(int64_t largest) const {
  std::vector<Chunks> all;
  for (int64_t b = 0; b < plan_.params->batch; ++b) all.push_back(chunks_of(b, largest));
  std::stable_sort(all.begin(), all.end(),
                   [](const Chunks& a, const Chunks& b) { return a.cost > b.cost; });
  return all;
}

// How much of the time of the threads goes into the products.
double BackwardWork::efficiency(const std::vector<Chunks>& all, int64_t threads) const {
  std::vector<int64_t> costs;
  int64_t work = 0;
  for (const Chunks& chunks : all) {
    work += plan_.params->heads_k * chunks.cost;
    for (int64_t head = 0; head < plan_.params->heads_k; ++head) {
      costs.insert(costs.end(), chunks.costs.begin(), chunks.costs.end());
    }
  }
  return busy_part(costs, threads) * static_cast<double>(multiplications_) /
         static_cast<double>(work);
}

// The chunks of a key head follow each other in order: each waits for the one before.
void BackwardWork::add_items() {
  const AttentionParams& p = *plan_.params;
  const int64_t most = kernels_.max_chunk_keys(p);
  std::vector<Chunks> all = all_chunks(most);
  for (const Chunks& chunks : all) multiplications_ += p.heads_k * chunks.multiplications;
  const int64_t threads = busy_threads(multiplications_);
  double best = threads == 1 ? 1 : efficiency(all, threads);
  for (int64_t keys = most - kKeyStep; keys >= most / 2 && best < kBusyEnough; keys -= kKeyStep) {
    std::vector<Chunks> finer = all_chunks(keys);
    const double then = efficiency(finer, threads);
    if (then > best) {
      best = then;
      all = std::move(finer);
    }
  }

  const int64_t spaces = p.heads / p.heads_k / plan_.rows.heads;  // of a key head
  for (const Chunks& chunks : all) {
    const int64_t keys = Sequence(p, chunks.sequence).mask.seqlen_k;
    for (int64_t head = 0; head < p.heads_k; ++head) {
      for (int64_t i = 0; i < size(chunks.costs); ++i) {
        items_.push_back({chunks.sequence, head * spaces, spaces, i * chunks.keys,
                          std::min(keys, (i + 1) * chunks.keys), chunks.keys, size(turns_)});
      }
      for (int64_t space = 0; space < spaces; ++space) {
        turns_.insert(turns_.end(), chunks.panels.begin(), chunks.panels.end());
      }
    }
  }
}

void BackwardWork::add_bias_tiles() {
  const AttentionParams& p = *plan_.params;
  int64_t longest_q = 0, longest_k = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence sequence(p, b);
    longest_q = std::max(longest_q, sequence.mask.seqlen_q);
    longest_k = std::max(longest_k, sequence.mask.seqlen_k);
  }
  const auto tiles = [](bool whole, int64_t length, int64_t step) {
    std::vector<TileRange<int64_t>> ranges;
    if (whole) return std::vector<TileRange<int64_t>>{{0, length}};
    for (int64_t begin = 0; begin < length; begin += step) {
      ranges.push_back({begin, std::min(length, begin + step)});
    }
    return ranges;
  };
  const int64_t* stride = p.dbias_stride;
  for (const auto& b : tiles(stride[0] == 0, p.batch, 1)) {
    for (const auto& h : tiles(stride[1] == 0, p.heads, 1)) {
      for (const auto& q : tiles(stride[2] == 0, longest_q, kernels_.panel_rows)) {
        for (const auto& k : tiles(stride[3] == 0, longest_k, kernels_.block_keys)) {
          bias_tiles_.push_back({b, h, q, k});
        }
      }
    }
  }
}

}  // namespace anyflash::cpu
