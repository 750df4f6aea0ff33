#include "kernels/cpu/forward_work.h"

#include <algorithm>
#include <memory>
#include <new>
#include <numeric>

namespace anyflash::cpu {
namespace {

// What costs as much as multiplying with so many rows (measured): to convert a key for an item of
// `forward`, to read it in `decode`.
constexpr int64_t kConversion = 12;
constexpr int64_t kReading = 16;

// Keys whose reading takes as long as the beginning and the end of an item of `decode`.
constexpr int64_t kBeginning = 8;

// Where reading is the work, cuts are cheap, and a share may be so much smaller.
constexpr int64_t kReaders = 16;

// Multiplications that a float of a part costs: it is written, read and weighted.
constexpr int64_t kPart = 48;

// What cuts may cost, as a part of the work: those with few threads pay it for nothing.
constexpr double kCutsCost = 0.05;

constexpr int64_t kFewRows = 64;        // of an item, so that reading is the work
constexpr int64_t kSplitKeys = 256;     // at least, per item of `forward`
constexpr int64_t kDecodeKeys = 32;     // at least, per item of `decode`, and a multiple
constexpr int64_t kCombinedParts = 16;  // of rows, about, per combination

}  // namespace

// Rows and all the keys they see, before keys are split.
struct ForwardWork::Block {
  Item item;
  bool decode;

  int64_t rows() const { return item.row_end - item.row_begin; }
  int64_t keys() const { return std::max<int64_t>(item.key_end - item.key_begin, 0); }
};

ForwardWork::ForwardWork(const ForwardKernels& kernels, const AttentionParams& params)
    : kernels_(kernels),
      plan_{&params, {params.dropout_p > 0 ? 1 : params.heads / params.heads_k}},
      spaces_(params.heads / plan_.rows.heads) {
  const std::vector<Block> all = blocks();
  int64_t work = 0, worth = 0;
  for (const Block& block : all) {
    const int64_t own = cost(block.item, block.decode);
    const bool reads = block.decode || block.rows() <= kFewRows;
    work += own;
    worth += reads ? own * kReaders : own;
    multiplications_ +=
        block.rows() * block.item.num_spaces * block.keys() * (params.head_dim + params.head_dim_v);
  }
  // Two threads are there nearly everywhere: half a share is enough for the second.
  const int64_t threads =
      std::max(busy_threads(worth), std::min<int64_t>(2, busy_threads(2 * worth)));
  cut(all, work);
  if (threads == 1) return;
  double best = busy_part(costs(), threads);
  int64_t best_most = work, last = work;
  const auto try_parts = [&](int64_t parts) {
    cut(all, last = work / parts);
    const std::vector<int64_t> finer = costs();
    const double spent = std::accumulate(finer.begin(), finer.end(), 0.0) +
                         static_cast<double>(workspace_floats_ * kPart);
    if (spent > (1 + kCutsCost) * static_cast<double>(work)) return false;
    const double busy = busy_part(finer, threads) * static_cast<double>(work) / spent;
    if (busy > best) {
      best = busy;
      best_most = last;
    }
    return best < kBusyEnough;
  };
  int64_t parts = 2;
  while (best < kBusyEnough && parts <= 4 * threads && try_parts(parts)) parts *= 2;
  if (best < kBusyEnough) try_parts(3 * threads / 2);
  if (best_most != last) cut(all, best_most);
}

int64_t ForwardWork::cost(const Item& item, bool decode) const {
  const AttentionParams& p = *plan_.params;
  const int64_t rows = item.row_end - item.row_begin;
  const int64_t of_a_key =
      decode ? std::max(rows, kReading) : round_up_to(rows, kReading) + kConversion;
  const int64_t keys = std::max<int64_t>(item.key_end - item.key_begin, 0);
  return of_a_key * item.num_spaces * (keys + (decode ? kBeginning : 0)) *
         (p.head_dim + p.head_dim_v);
}

std::vector<int64_t> ForwardWork::costs() const {
  std::vector<int64_t> costs;
  for (const Work& w : work_) costs.push_back(w.cost);
  return costs;
}

int64_t ForwardWork::rows_of(const Sequence& sequence) const {
  return std::max<int64_t>(sequence.mask.seqlen_q, 0) * plan_.rows.heads;
}

std::vector<ForwardWork::Block> ForwardWork::blocks() const {
  const AttentionParams& p = *plan_.params;
  const bool can_decode = kernels_.can_decode(plan_);
  // Key heads whose rows lie side by side are walked together: memory is then read as a stream.
  const int64_t decode_spaces = p.k.head_stride <= p.k.row_stride ? spaces_ : 1;
  std::vector<Block> all;
  all.reserve(static_cast<size_t>(p.batch * spaces_));
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence sequence(p, b);
    const int64_t rows = rows_of(sequence);
    const bool decode = can_decode && rows < kernels_.decode_rows;
    const int64_t spaces = decode ? decode_spaces : 1;
    for (int64_t row = 0; row < rows; row += kernels_.item_rows) {
      const int64_t end = std::min(rows, row + kernels_.item_rows);
      const TileRange<int64_t> keys = plan_.rows.keys(sequence.mask, row, end);
      for (int64_t space = 0; space < spaces_; space += spaces) {
        all.push_back({{b, space, spaces, row, end, keys.begin, keys.end, nullptr}, decode});
      }
    }
  }
  return all;
}

// Makes the items anew, of about `most` multiplications at most, those with the most first.
void ForwardWork::cut(const std::vector<Block>& blocks, int64_t most) {
  work_.clear();
  work_.reserve(blocks.size());
  combinations_.clear();
  workspace_floats_ = 0;
  for (const Block& block : blocks) {
    const int64_t parts =
        std::max<int64_t>(1, ceil_div(cost(block.item, block.decode), std::max<int64_t>(most, 1)));
    if (block.decode) {
      add(block, std::min(parts, std::max<int64_t>(1, block.keys() / kDecodeKeys)));
      continue;
    }
    // Rows first: halves of them read the keys twice, parts of the keys have to be combined.
    const int64_t half = kernels_.item_rows / 2;
    const int64_t pieces = parts > 1 && block.rows() > half ? 2 : 1;
    const int64_t step = pieces == 2 ? half : kernels_.item_rows;
    const Sequence sequence(*plan_.params, block.item.sequence);
    for (int64_t row = block.item.row_begin; row < block.item.row_end; row += step) {
      Block piece = block;
      piece.item.row_begin = row;
      piece.item.row_end = std::min(block.item.row_end, row + step);
      const TileRange<int64_t> keys = plan_.rows.keys(sequence.mask, row, piece.item.row_end);
      piece.item.key_begin = keys.begin;
      piece.item.key_end = keys.end;
      const int64_t most_splits = std::max<int64_t>(1, piece.keys() / kSplitKeys);
      add(piece, std::min(ceil_div(parts, pieces), most_splits));
    }
  }
  const auto longer = [](const Work& a, const Work& b) { return a.cost > b.cost; };
  if (!std::is_sorted(work_.begin(), work_.end(), longer)) {
    std::stable_sort(work_.begin(), work_.end(), longer);
  }
}

void ForwardWork::add(const Block& block, int64_t splits) {
  const AttentionParams& p = *plan_.params;
  Item item = block.item;
  const int64_t rows = block.rows(), keys = block.keys();
  const int64_t space_floats = rows * partial_row_floats(p);
  const int64_t part = space_floats * item.num_spaces;
  if (splits > 1) {
    const int64_t step = std::max<int64_t>(1, kCombinedParts / splits);
    for (int64_t space = 0; space < item.num_spaces; ++space) {
      for (int64_t row = item.row_begin; row < item.row_end; row += step) {
        Item rest = item;
        rest.space += space;
        rest.num_spaces = 1;
        rest.row_begin = row;
        rest.row_end = std::min(item.row_end, row + step);
        combinations_.push_back({{rest, splits, part},
                                 workspace_floats_ + space * space_floats +
                                     (row - item.row_begin) * partial_row_floats(p)});
      }
    }
  }
  const int64_t begin = item.key_begin;
  const int64_t step = round_up_to(ceil_div(keys, splits), block.decode ? kDecodeKeys : 64);
  for (int64_t s = 0; s < splits; ++s) {
    item.key_begin = begin + std::min(keys, s * step);
    item.key_end = begin + std::min(keys, (s + 1) * step);
    work_.push_back(
        {item, cost(item, block.decode), splits > 1 ? workspace_floats_ : -1, block.decode});
    if (splits > 1) workspace_floats_ += part;
  }
}

int64_t ForwardWork::scratch_bytes() const {
  int64_t spaces = 0, bytes = 0;
  bool forward = false;
  for (const Work& w : work_) {
    forward |= !w.decode;
    if (w.decode) spaces = w.item.num_spaces;
  }
  if (forward) bytes = kernels_.scratch_bytes(plan_);
  if (spaces > 0) bytes = std::max(bytes, kernels_.decode_scratch_bytes(plan_, spaces));
  return bytes;
}

int32_t ForwardWork::run(const CpuThreads* threads) {
  std::unique_ptr<float[]> workspace;
  if (workspace_floats_ > 0) {
    workspace.reset(new (std::nothrow) float[static_cast<size_t>(workspace_floats_)]);
    if (!workspace) return kErrorNoMemory;
    for (Work& work : work_) {
      if (work.workspace >= 0) work.item.partial = workspace.get() + work.workspace;
    }
    for (Rest& rest : combinations_) {
      rest.combination.item.partial = workspace.get() + rest.workspace;
    }
  }
  const auto attend = [](void* self, int64_t i, char* memory) {
    const auto* work = static_cast<const ForwardWork*>(self);
    const Work& w = work->work_[static_cast<size_t>(i)];
    (w.decode ? work->kernels_.decode : work->kernels_.forward)(work->plan_, w.item, memory);
  };
  const int64_t max_threads = 1 + multiplications_ / kWorthAThread;
  const int32_t error = run_parallel(threads, max_threads, static_cast<int64_t>(work_.size()),
                                     scratch_bytes(), attend, this);
  if (error != 0 || combinations_.empty()) return error;
  const auto combine = [](void* self, int64_t i, char*) {
    const auto* work = static_cast<const ForwardWork*>(self);
    work->kernels_.combine(work->plan_, work->combinations_[static_cast<size_t>(i)].combination);
  };
  return run_parallel(threads, 1 + workspace_floats_ * kPart / kWorthAThread,
                      static_cast<int64_t>(combinations_.size()), 0, combine, this);
}

}  // namespace anyflash::cpu
