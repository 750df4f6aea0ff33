// One call of the cross entropy as data. Formulas: kernels/cross_entropy_params.h.
#pragma once

#include "core/tensor_view.h"

namespace anyflash {

struct CrossEntropyCall {
  TensorView logits;   // (rows, vocab)
  TensorView labels;   // (rows) int64
  TensorView lse;      // (rows) fp32, fp64 for fp64 logits: a precomputed one; backward: the lse
  TensorView dlosses;  // the same; given for the backward
  double smoothing = 0.0;
  double logit_scale = 1.0;
  double lse_square_scale = 0.0;
  int64_t ignore_index = -100;
  int64_t class_start = 0;
  int64_t total_classes = 0;
  bool in_place = false;  // the backward writes over the logits
};

// What the kernel writes.
struct CrossEntropyResults {
  TensorView losses, z_losses, lse;  // forward: (rows) fp32
  TensorView dlogits;                // backward: logits' shape, may be the logits
  void* workspace = nullptr;         // forward: cross_entropy_workspace() bytes
};

// Refuses what cannot be computed; values of labels, in the forward, where TensorView::host has
// them.
void check_cross_entropy(const CrossEntropyCall& call);

int64_t cross_entropy_workspace(const CrossEntropyCall& call);

// Runs the kernel on the CPU, in the instance's direction. `call` is checked; columns of logits lie
// side by side, labels and lse are contiguous. `where` is a CpuThreads.
void run_cross_entropy(const Instance& instance, const CrossEntropyCall& call,
                       const CrossEntropyResults& results, void* where);

}  // namespace anyflash
