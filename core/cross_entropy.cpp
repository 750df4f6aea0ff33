#include "core/cross_entropy.h"

#include "core/huge_pages.h"
#include "core/run.h"
#include "kernels/cross_entropy_params.h"

namespace anyflash {

int64_t cross_entropy_workspace(const CrossEntropyCall& call) {
  return cross_entropy::workspace_floats(call.logits.size(0), call.logits.size(1)) *
         int64_t(sizeof(float));
}

void run_cross_entropy(const Instance& instance, const CrossEntropyCall& call,
                       const CrossEntropyResults& results, void* where) {
  const auto to_write = [](const TensorView& x) { return static_cast<float*>(x.data); };
  CrossEntropyParams params{};
  params.logits = call.logits.data;
  params.labels = data_of<int64_t>(call.labels);
  params.given_lse = data_of<float>(call.lse);
  params.rows = call.logits.size(0);
  params.vocab = call.logits.size(1);
  params.logits_row_stride = call.logits.stride(0);
  params.ignore_index = call.ignore_index;
  params.class_start = call.class_start;
  params.total_classes = call.total_classes;
  params.smoothing = static_cast<float>(call.smoothing);
  params.logit_scale = static_cast<float>(call.logit_scale);
  params.lse_square_scale = static_cast<float>(call.lse_square_scale);
  if (instance.direction == Direction::forward) {
    params.losses = to_write(results.losses);
    params.z_losses = to_write(results.z_losses);
    params.lse = to_write(results.lse);
    params.workspace = static_cast<float*>(results.workspace);
  } else {
    if (results.dlogits.data != call.logits.data) ask_for_huge_pages(results.dlogits);
    params.dlosses = data_of<float>(call.dlosses);
    params.dlosses_stride = call.dlosses.stride(0);
    params.dlogits = results.dlogits.data;
    params.dlogits_row_stride = results.dlogits.stride(0);
  }
  launch(instance, &params, where);
}

}  // namespace anyflash
