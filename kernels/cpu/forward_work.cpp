// The items of a forward pass.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "kernels/cpu/plan.h"
#include "kernels/cpu/work.h"

namespace anyflash::cpu {
namespace {

constexpr int64_t kSplitKeys = 512;   // at least, per item of `forward`
constexpr int64_t kDecodeKeys = 256;  // at least, per item of `decode`

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

}  // namespace anyflash::cpu
