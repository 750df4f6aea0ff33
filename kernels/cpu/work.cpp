// Who computes what: the list of items of a call, spread over the caller's threads.
#include "kernels/cpu/work.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "kernels/arch.h"
#include "kernels/launch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace anyflash::cpu {
namespace {

// A thread is worth waking for this many multiplications (some microseconds).
constexpr int64_t kWorthAThread = 1 << 18;

// With fewer items than this, keys are split as well: the processors may have many cores.
constexpr int64_t kEnoughItems = 64;

constexpr int64_t kSplitKeys = 512;   // at least, per item of `forward`
constexpr int64_t kDecodeKeys = 256;  // at least, per item of `decode`

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};

// The calling thread's scratch memory; kept, since a fresh page costs more than its use. Null if
// there is none.
char* scratch_memory(int64_t bytes) {
  static thread_local std::unique_ptr<char, Free> memory;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    size = 0;
    const int64_t pages = (bytes + 4095) / 4096 * 4096;
    memory.reset(static_cast<char*>(std::aligned_alloc(4096, static_cast<size_t>(pages))));
    if (memory) size = pages;
  }
  return memory.get();
}

// Workers take the next number from one counter, so that parts of uneven size end together whatever
// the parallel-for does with its range.
struct Job {
  void (*task)(void*, int64_t, char*);
  void* context;
  int64_t count;
  int64_t scratch_bytes;
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};

  void work() {
    char* scratch = scratch_memory(scratch_bytes);
    if (scratch == nullptr) {
      out_of_memory = true;
      return;
    }
    for (;;) {
      const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= count) return;
      task(context, i, scratch);
    }
  }
};

bool sensible(const AttentionParams& p) {
  return p.heads_k > 0 && p.heads % p.heads_k == 0 && p.head_dim > 0 && p.head_dim_v > 0;
}

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

}  // namespace

int32_t run_parallel(const CpuThreads* threads, int64_t max_threads, int64_t count,
                     int64_t scratch_bytes, void (*task)(void* context, int64_t i, char* scratch),
                     void* context) {
  Job job{task, context, count, scratch_bytes + 64};
  int64_t workers = std::min(max_threads, count);
  if (threads == nullptr || threads->parallel_for == nullptr) workers = 1;
  if (threads != nullptr) workers = std::min<int64_t>(workers, threads->num_threads);
  if (workers <= 1) {
    job.work();
  } else {
    const auto body = [](int64_t, int64_t, void* shared) { static_cast<Job*>(shared)->work(); };
    if (threads->parallel_for(0, workers, 1, body, &job) != 0) return kErrorParallelFor;
  }
  return job.out_of_memory ? kErrorNoMemory : 0;
}

namespace {

// The items of a forward pass, those with the most work first.
class ForwardWork {
 public:
  ForwardWork(const ForwardKernels& kernels, const AttentionParams& params)
      : kernels_(kernels),
        plan_{&params, {params.dropout_p > 0 ? 1 : params.heads / params.heads_k}} {
    spaces_ = params.heads / plan_.rows.heads;
    const bool can_decode = kernels.can_decode(plan_);
    // Key heads whose rows lie side by side are walked together: memory is then read as a stream.
    decode_spaces_ = params.k.head_stride <= params.k.row_stride ? spaces_ : 1;
    std::vector<int64_t> decoded;
    int64_t blocks = 0;
    for (int64_t b = 0; b < params.batch; ++b) {
      const int64_t rows = rows_of(Sequence(params, b));
      if (can_decode && rows < kernels.decode_rows) {
        if (rows > 0) decoded.push_back(b);
      } else {
        blocks += ceil_div(rows, kernels.item_rows) * spaces_;
      }
    }
    size_t next_decoded = 0;
    for (int64_t b = 0; b < params.batch; ++b) {
      if (next_decoded < decoded.size() && decoded[next_decoded] == b) {
        ++next_decoded;
        add_decode(b, static_cast<int64_t>(decoded.size()) * (spaces_ / decode_spaces_));
      } else {
        add_forward(b, blocks);
      }
    }
    std::stable_sort(work_.begin(), work_.end(),
                     [](const Work& a, const Work& b) { return a.cost > b.cost; });
  }

  int32_t run(const CpuThreads* threads) {
    std::unique_ptr<float[]> workspace;
    if (workspace_floats_ > 0) {
      workspace.reset(new (std::nothrow) float[static_cast<size_t>(workspace_floats_)]);
      if (!workspace) return kErrorNoMemory;
      for (Work& work : work_) {
        if (work.workspace >= 0) work.item.partial = workspace.get() + work.workspace;
      }
      for (size_t i = 0; i < combinations_.size(); ++i) {
        combinations_[i].item.partial = workspace.get() + combination_workspace_[i];
      }
    }
    int64_t scratch = has_forward_ ? kernels_.scratch_bytes(plan_) : 0;
    if (has_decode_) {
      scratch = std::max(scratch, kernels_.decode_scratch_bytes(plan_, decode_spaces_));
    }
    const auto attend = [](void* self, int64_t i, char* memory) {
      const auto* work = static_cast<const ForwardWork*>(self);
      const Work& w = work->work_[static_cast<size_t>(i)];
      (w.decode ? work->kernels_.decode : work->kernels_.forward)(work->plan_, w.item, memory);
    };
    const int64_t max_threads = 1 + multiplications_ / kWorthAThread;
    const auto count = static_cast<int64_t>(work_.size());
    const int32_t error = run_parallel(threads, max_threads, count, scratch, attend, this);
    if (error != 0 || combinations_.empty()) return error;
    const auto combine = [](void* self, int64_t i, char*) {
      const auto* work = static_cast<const ForwardWork*>(self);
      work->kernels_.combine(work->plan_, work->combinations_[static_cast<size_t>(i)]);
    };
    return run_parallel(threads, 1 + workspace_floats_ / kWorthAThread,
                        static_cast<int64_t>(combinations_.size()), 0, combine, this);
  }

 private:
  struct Work {
    Item item;
    int64_t cost;
    int64_t workspace;  // of item.partial, or -1
    bool decode;
  };

  int64_t rows_of(const Sequence& sequence) const {
    return std::max<int64_t>(sequence.mask.seqlen_q, 0) * plan_.rows.heads;
  }

  void add(Item item, bool decode, int64_t splits) {
    const AttentionParams& p = *plan_.params;
    (decode ? has_decode_ : has_forward_) = true;
    const int64_t rows = item.row_end - item.row_begin;
    const int64_t keys = std::max<int64_t>(item.key_end - item.key_begin, 0);
    const int64_t part = rows * item.num_spaces * partial_row_floats(p);
    if (splits > 1) {
      combinations_.push_back({item, splits, part});
      combination_workspace_.push_back(workspace_floats_);
    }
    const int64_t begin = item.key_begin, step = round_up(ceil_div(keys, splits), 64);
    for (int64_t s = 0; s < splits; ++s) {
      item.key_begin = begin + std::min(keys, s * step);
      item.key_end = begin + std::min(keys, (s + 1) * step);
      const int64_t cost = (rows * item.num_spaces) * (item.key_end - item.key_begin);
      multiplications_ += cost * (p.head_dim + p.head_dim_v);
      work_.push_back({item, cost, splits > 1 ? workspace_floats_ : -1, decode});
      if (splits > 1) workspace_floats_ += part;
    }
  }

  static int64_t round_up(int64_t x, int64_t multiple) { return ceil_div(x, multiple) * multiple; }

  static int64_t splits_for(int64_t keys, int64_t least_keys, int64_t items) {
    return std::max<int64_t>(1, std::min(keys / least_keys, kEnoughItems / items));
  }

  void add_forward(int64_t b, int64_t blocks) {
    const Sequence sequence(*plan_.params, b);
    const int64_t rows = rows_of(sequence);
    // Few items: half the rows each, so that more threads have work.
    const int64_t step = blocks * 4 < kEnoughItems ? kernels_.item_rows / 2 : kernels_.item_rows;
    for (int64_t row = 0; row < rows; row += step) {
      const int64_t end = std::min(rows, row + step);
      const TileRange<int64_t> keys = plan_.rows.keys(sequence.mask, row, end);
      const int64_t splits = splits_for(keys.end - keys.begin, kSplitKeys, blocks);
      for (int64_t space = 0; space < spaces_; ++space) {
        add({b, space, 1, row, end, keys.begin, keys.end, nullptr}, false, splits);
      }
    }
  }

  void add_decode(int64_t b, int64_t items) {
    const Sequence sequence(*plan_.params, b);
    const int64_t rows = rows_of(sequence);
    const TileRange<int64_t> keys = plan_.rows.keys(sequence.mask, 0, rows);
    const int64_t splits = splits_for(keys.end - keys.begin, kDecodeKeys, items);
    for (int64_t space = 0; space < spaces_; space += decode_spaces_) {
      add({b, space, decode_spaces_, 0, rows, keys.begin, keys.end, nullptr}, true, splits);
    }
  }

  const ForwardKernels& kernels_;
  ForwardPlan plan_;
  int64_t spaces_ = 0;
  int64_t decode_spaces_ = 0;
  std::vector<Work> work_;
  std::vector<Combination> combinations_;
  std::vector<int64_t> combination_workspace_;
  int64_t workspace_floats_ = 0;
  int64_t multiplications_ = 0;
  bool has_forward_ = false;
  bool has_decode_ = false;
};

}  // namespace

int32_t run(const ForwardKernels& kernels, const AttentionParams& params,
            const CpuThreads* threads) {
  if (params.batch <= 0 || params.heads <= 0) return 0;
  if (!sensible(params)) return kErrorInvalidParams;
  try {
    return ForwardWork(kernels, params).run(threads);
  } catch (const std::bad_alloc&) {
    return kErrorNoMemory;
  }
}

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
        plan_{&params, {params.dropout_p > 0 ? 1 : params.heads / params.heads_k}, {}, nullptr} {
    add_deltas();
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
  std::vector<BackwardItem> items_;
  std::vector<BiasItem> bias_tiles_;
  std::unique_ptr<float[]> delta_;
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

int32_t anyflash_cpu_isa(void) {
  namespace Isa = anyflash::Isa;
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kF16c = 1u << 29, kAmxBf16 = 1u << 22;  // CPUID 1 ECX, CPUID 7.0 EDX
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & kF16c) != 0;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !f16c) return Isa::none;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return Isa::avx2;
  }
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
  const bool amx = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kAmxBf16) != 0;
  return amx ? Isa::amx : Isa::avx512bf16;
#elif defined(__aarch64__)
  return Isa::neon;
#else
  return Isa::none;
#endif
}
