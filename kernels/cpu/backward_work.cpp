// The items of a backward pass, and the order in which they add to dq.
#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "kernels/cpu/plan.h"
#include "kernels/cpu/work.h"

namespace anyflash::cpu {

struct GradientPanels {
  struct Panel {
    std::atomic<int64_t> turn{0};
    float* memory = nullptr;
  };

  std::unique_ptr<Panel[]> panels;
  int64_t bytes;  // of a panel
  std::mutex mutex;
  std::vector<std::unique_ptr<char, Free>> owned;
  std::vector<float*> unused;
  std::unique_ptr<char, Free> last_resort;  // where memory runs out; the call then fails
  std::atomic<bool> out_of_memory{false};

  GradientPanels(int64_t count, int64_t panel_bytes)
      : panels(new Panel[static_cast<size_t>(count)]),
        bytes((panel_bytes + 63) / 64 * 64),
        last_resort(allocate()) {
    if (!last_resort) throw std::bad_alloc();
  }

  char* allocate() const {
    return static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(bytes)));
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
};

float* wait_for_turn(GradientPanels& panels, int64_t panel, int64_t turn) {
  GradientPanels::Panel& own = panels.panels[static_cast<size_t>(panel)];
  // Whoever is waited for began earlier (run_parallel's order), so this ends.
  for (int tries = 0; own.turn.load(std::memory_order_acquire) != turn; ++tries) {
    if (tries > 64) std::this_thread::yield();
  }
  if (turn == 0) own.memory = panels.take();
  return own.memory;
}

void pass_on(GradientPanels& panels, int64_t panel, bool last) {
  GradientPanels::Panel& own = panels.panels[static_cast<size_t>(panel)];
  if (last) panels.give_back(own.memory);
  own.turn.fetch_add(1, std::memory_order_release);
}

namespace {

class BackwardWork {
 public:
  BackwardWork(const BackwardKernels& kernels, const AttentionParams& params)
      : kernels_(kernels),
        plan_{&params, {params.dropout_p > 0 ? 1 : params.heads / params.heads_k}, {}, {}, {},
              nullptr} {
    add_deltas();
    if (some_row_is_far()) add_far_rows();
    add_items();
    if (params.dbias != nullptr) add_bias_tiles();
    panels_ = std::make_unique<GradientPanels>(
        num_panels_, kernels.panel_rows * ceil_div(params.head_dim, 16) * 16 * 4);
    plan_.panels = panels_.get();
  }

  int32_t run(const CpuThreads* threads) {
    const AttentionParams& p = *plan_.params;
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
    error = run_parallel(threads, max_threads, size(items_), kernels_.scratch_bytes(plan_),
                         backward, this);
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

 private:
  struct Queries {
    int64_t sequence;
    int64_t begin;
    int64_t end;
  };

  template <class T>
  static int64_t size(const std::vector<T>& list) {
    return static_cast<int64_t>(list.size());
  }

  // One delta per row, laid out like lse.
  void add_deltas() {
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
    delta_.reset(new float[static_cast<size_t>(num_deltas_)]);
    plan_.delta = {delta_.get(), p.heads * rows, rows};
  }

  bool some_row_is_far() const {
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

  void add_far_rows() {
    const AttentionParams& p = *plan_.params;
    far_statistics_.reset(new float[static_cast<size_t>(2 * num_deltas_)]);
    plan_.reference = plan_.remainder = plan_.delta;
    plan_.reference.data = far_statistics_.get();
    plan_.remainder.data = far_statistics_.get() + num_deltas_;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t rows = std::max<int64_t>(Sequence(p, b).mask.seqlen_q, 0) * plan_.rows.heads;
      for (int64_t space = 0; space < p.heads / plan_.rows.heads; ++space) {
        for (int64_t row = 0; row < rows; row += kernels_.panel_rows) {
          const int64_t end = std::min(rows, row + kernels_.panel_rows);
          far_rows_.push_back({b, space, 1, row, end, 0, 0, nullptr});
        }
      }
    }
  }

  // Chunks of a row space follow each other in order: each waits for the one before.
  void add_items() {
    const AttentionParams& p = *plan_.params;
    struct Cost {
      int64_t sequence;
      int64_t multiplications;
    };
    std::vector<Cost> costs;
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence sequence(p, b);
      const int64_t rows = std::max<int64_t>(sequence.mask.seqlen_q, 0) * plan_.rows.heads;
      costs.push_back({b, rows * sequence.mask.seqlen_k});
      multiplications_ += p.heads / plan_.rows.heads * costs.back().multiplications *
                          (3 * p.head_dim + 2 * p.head_dim_v);
    }
    std::stable_sort(costs.begin(), costs.end(), [](const Cost& a, const Cost& b) {
      return a.multiplications > b.multiplications;
    });
    // Few key heads: half the keys each, so that more threads have work.
    const int64_t most = kernels_.max_chunk_keys(p);
    const int64_t largest = p.batch * p.heads_k < kEnoughItems / 4 ? most / 2 : most;
    for (const Cost& cost : costs) {
      const Sequence sequence(p, cost.sequence);
      const int64_t keys = sequence.mask.seqlen_k;
      const int64_t rows = std::max<int64_t>(sequence.mask.seqlen_q, 0) * plan_.rows.heads;
      const int64_t spaces = p.heads / p.heads_k / plan_.rows.heads;  // of a key head
      const int64_t panels = spaces * ceil_div(rows, kernels_.panel_rows);
      const int64_t chunk = chunk_keys(keys, largest);
      for (int64_t space = 0; space < p.heads / plan_.rows.heads; space += spaces) {
        int64_t begin = 0;
        do {
          const int64_t end = std::min(keys, begin + chunk);
          items_.push_back({cost.sequence, space, spaces, begin, end, chunk, num_panels_});
          begin = end;
        } while (begin < keys);
        num_panels_ += panels;
      }
    }
  }

  // Keys per chunk: chunks of a sequence are of about the same size, at most `largest`.
  static int64_t chunk_keys(int64_t keys, int64_t largest) {
    const int64_t chunks = std::max<int64_t>(1, ceil_div(keys, largest));
    return std::min(largest, ceil_div(ceil_div(keys, chunks), 12) * 12);
  }

  void add_bias_tiles() {
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

  static constexpr int64_t kDeltaRows = 64;

  const BackwardKernels& kernels_;
  BackwardPlan plan_;
  std::vector<Queries> queries_;
  std::vector<Item> far_rows_;
  std::vector<BackwardItem> items_;
  std::vector<BiasItem> bias_tiles_;
  std::unique_ptr<float[]> delta_;
  std::unique_ptr<float[]> far_statistics_;
  std::unique_ptr<GradientPanels> panels_;
  int64_t num_deltas_ = 0;
  int64_t num_panels_ = 0;
  int64_t multiplications_ = 0;
};

}  // namespace

int32_t run(const BackwardKernels& kernels, const AttentionParams& params,
            const CpuThreads* threads) {
  if (params.heads <= 0) return 0;
  if (!sensible(params) || params.block_table != nullptr) return kErrorInvalidParams;
  try {
    return BackwardWork(kernels, params).run(threads);
  } catch (const std::bad_alloc&) {
    return kErrorNoMemory;
  }
}

}  // namespace anyflash::cpu
