// The items of a forward pass. They follow from the problem and the numbers in the kernels' table;
// making them reads neither q, k nor v.
#pragma once

#include <vector>

#include "kernels/cpu/plan.h"
#include "kernels/cpu/work.h"

namespace anyflash::cpu {

class ForwardWork {
 public:
  struct Work {
    Item item;
    int64_t cost;       // multiplications
    int64_t workspace;  // of item.partial, or -1
    bool decode;
  };
  struct Rest {
    Combination combination;
    int64_t workspace;  // of combination.item.partial
  };

  ForwardWork(const ForwardKernels& kernels, const AttentionParams& params);
  int32_t run(const CpuThreads* threads);

  // In the order in which they begin; then what is combined, after all of them.
  const std::vector<Work>& items() const { return work_; }
  const std::vector<Rest>& combinations() const { return combinations_; }
  int64_t workspace_floats() const { return workspace_floats_; }
  int64_t scratch_bytes() const;  // of a thread

 private:
  struct Block;

  int64_t rows_of(const Sequence& sequence) const;
  std::vector<Block> blocks() const;
  void cut(const std::vector<Block>& blocks, int64_t most);
  void add(const Block& block, int64_t splits);
  int64_t cost(const Item& item, bool decode) const;
  std::vector<int64_t> costs() const;

  const ForwardKernels& kernels_;
  ForwardPlan plan_;
  int64_t spaces_;
  std::vector<Work> work_;
  std::vector<Rest> combinations_;
  int64_t workspace_floats_ = 0;
  int64_t multiplications_ = 0;
};

}  // namespace anyflash::cpu
