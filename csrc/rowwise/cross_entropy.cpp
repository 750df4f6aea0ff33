// Cross entropy on the CPU: results are allocated, what no kernel reads is converted, the core
// checks and launches.
#include "operators.h"
#include "stable/contiguous_rows.h"
#include "stable/grad_mode.h"
#include "stable/launch_on.h"
#include "stable/view.h"

namespace anyflash {
namespace {

// Makes the views what a kernel reads; lives until it has run.
struct Converted {
  Converted(const Tensor& logits, const Tensor& labels, const OptionalTensor& lse,
            CrossEntropyCall& call)
      : logits(contiguous_rows(logits)),
        labels(contiguous(labels)),
        lse(lse ? OptionalTensor(contiguous(*lse)) : lse) {
    call.logits = view_of(this->logits);
    call.labels = view_of(this->labels);
    call.lse = view_of(this->lse);
  }
  Tensor logits, labels;
  OptionalTensor lse;
};

void write_gradient(const Instance& kernel, const Tensor& logits, const Tensor& labels,
                    const Tensor& lse, CrossEntropyCall call, const Tensor& dlogits) {
  const Converted converted(logits, labels, lse, call);
  CrossEntropyResults results;
  results.dlogits = view_to_write(dlogits);
  const LaunchOn where(logits);
  check_status(anyflash_run_cross_entropy(&kernel, &call, &results, where.get()));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(
    const Tensor& logits, const Tensor& labels, const OptionalTensor& precomputed_lse,
    double smoothing, double logit_scale, double lse_square_scale, int64_t ignore_index,
    int64_t class_start_idx, int64_t total_classes) {
  const NoGrad no_grad;
  CrossEntropyCall call{view_of(logits), view_of(labels), view_of(precomputed_lse), {},
                        smoothing,       logit_scale,     lse_square_scale,         ignore_index,
                        class_start_idx, total_classes};
  const Instance* kernel = nullptr;
  check_status(anyflash_prepare_cross_entropy(&call, &kernel));
  const Converted converted(logits, labels, precomputed_lse, call);
  const Sizes rows = logits.sizes().slice(0, 1);
  const Tensor losses = empty(rows, logits, ScalarType::Float),
               z_losses = empty(rows, logits, ScalarType::Float),
               lse = empty(rows, logits, ScalarType::Float);
  const Tensor workspace =
      empty({anyflash_cross_entropy_workspace(&call)}, logits, ScalarType::Byte);
  CrossEntropyResults results{view_to_write(losses),
                              view_to_write(z_losses),
                              view_to_write(lse),
                              {},
                              workspace.mutable_data_ptr()};
  const LaunchOn where(logits);
  check_status(anyflash_run_cross_entropy(kernel, &call, &results, where.get()));
  return {losses, z_losses, lse};
}

Tensor cross_entropy_backward(const Tensor& dlosses, const Tensor& logits, const Tensor& labels,
                              const Tensor& lse, double smoothing, double logit_scale,
                              double lse_square_scale, int64_t ignore_index,
                              int64_t class_start_idx, int64_t total_classes) {
  const NoGrad no_grad;
  const CrossEntropyCall call{view_of(logits), view_of(labels), view_of(lse),     view_of(dlosses),
                              smoothing,       logit_scale,     lse_square_scale, ignore_index,
                              class_start_idx, total_classes};
  const Instance* kernel = nullptr;
  check_status(anyflash_prepare_cross_entropy(&call, &kernel));
  Tensor dlogits = empty(logits.sizes(), logits, logits.scalar_type());
  write_gradient(*kernel, logits, labels, lse, call, dlogits);
  return dlogits;
}

void cross_entropy_backward_(const Tensor& dlosses, const Tensor& logits, const Tensor& labels,
                             const Tensor& lse, double smoothing, double logit_scale,
                             double lse_square_scale, int64_t ignore_index, int64_t class_start_idx,
                             int64_t total_classes) {
  const NoGrad no_grad;
  const CrossEntropyCall call{view_to_write(logits), view_of(labels),  view_of(lse),
                              view_of(dlosses),      smoothing,        logit_scale,
                              lse_square_scale,      ignore_index,     class_start_idx,
                              total_classes,         /*in_place=*/true};
  const Instance* kernel = nullptr;
  check_status(anyflash_prepare_cross_entropy(&call, &kernel));
  write_gradient(*kernel, logits, labels, lse, call, logits);
}

}  // namespace anyflash
