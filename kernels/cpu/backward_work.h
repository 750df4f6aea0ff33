// The items of a backward pass. They follow from the problem and the numbers in the kernels' table;
// making them reads no tensor.
#pragma once

#include <memory>
#include <vector>

#include "kernels/cpu/plan.h"
#include "kernels/cpu/work.h"

namespace anyflash::cpu {

class BackwardWork {
 public:
  BackwardWork(const BackwardKernels& kernels, const AttentionParams& params);
  ~BackwardWork();
  int32_t run(const CpuThreads* threads);

  // In the order in which they begin.
  const std::vector<BackwardItem>& items() const { return items_; }
  int64_t scratch_bytes() const { return kernels_.scratch_bytes(plan_); }  // of a thread
  int64_t panel_floats() const;                                            // of a panel of dq

 private:
  struct Queries {
    int64_t sequence;
    int64_t begin;
    int64_t end;
  };
  struct Chunks;

  void add_queries();
  bool some_row_is_far() const;
  void add_far_rows();
  int64_t rows_of(const Sequence& sequence) const;
  Chunks chunks_of(int64_t sequence, int64_t largest) const;
  std::vector<Chunks> all_chunks(int64_t largest) const;
  double efficiency(const std::vector<Chunks>& all, int64_t threads) const;
  void add_items();
  void add_bias_tiles();

  const BackwardKernels& kernels_;
  BackwardPlan plan_;
  std::vector<Queries> queries_;
  std::vector<Item> far_rows_;
  std::vector<BackwardItem> items_;
  std::vector<BiasItem> bias_tiles_;
  std::vector<int64_t> turns_;  // of every panel
  std::unique_ptr<float[]> delta_;
  std::unique_ptr<float[]> far_statistics_;
  std::unique_ptr<GradientPanels> panels_;
  int64_t num_deltas_ = 0;
  int64_t multiplications_ = 0;
};

}  // namespace anyflash::cpu
