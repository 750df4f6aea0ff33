// Cross entropy on the CPU. kernels/cross_entropy_params.h has the formulas.
#include <cmath>

#include "kernels/cross_entropy_params.h"
#include "operators.h"
#include "rowwise/rowwise.h"
#include "stable/aten.h"
#include "stable/check.h"
#include "stable/contiguous_rows.h"
#include "stable/dtypes.h"
#include "stable/launch_on.h"

namespace anyflash {
namespace {

struct Options {
  double smoothing;
  double logit_scale;
  double lse_square_scale;
  int64_t ignore_index;
  int64_t class_start;
  int64_t total_classes;
};

// One number per row of logits.
void check_per_row(const Tensor& x, const char* name, int32_t dtype, const char* dtype_name,
                   const Tensor& logits) {
  AF_CHECK(dtype_of(x) == dtype, name, ": expected ", dtype_name, ", got ", dtype_text(x));
  AF_CHECK(x.dim() == 1 && x.size(0) == logits.size(0), name, ": expected (", logits.size(0),
           ",), one per row of logits, got ", shape_text(x));
  check_same_device(logits, "logits", x, name);
}

void validate(const Tensor& logits, const Tensor& labels, const Options& o) {
  AF_CHECK(dtypes().is_floating(dtype_of(logits)),
           "logits: expected fp16, bf16, fp32 or fp64, got ", dtype_text(logits));
  AF_CHECK(logits.dim() == 2 && logits.size(1) > 0,
           "logits: expected (rows, vocab) with at least one class, got ", shape_text(logits));
  check_per_row(labels, "labels", dtypes().int64, "int64", logits);
  AF_CHECK(o.smoothing >= 0 && o.smoothing < 1, "label_smoothing: expected 0 <= it < 1, got ",
           o.smoothing);
  const auto scale = static_cast<float>(o.logit_scale);  // as the kernel takes it
  AF_CHECK(scale > 0 && std::isfinite(scale), "logit_scale: expected a positive number, got ",
           o.logit_scale);
  AF_CHECK(std::isfinite(o.lse_square_scale), "lse_square_scale: expected a finite number, got ",
           o.lse_square_scale);
  AF_CHECK(o.class_start >= 0 && o.class_start <= o.total_classes - logits.size(1),
           "total_classes: expected at least class_start_idx ", o.class_start, " + vocab ",
           logits.size(1), ", got ", o.total_classes);
}

void check_labels(const Tensor& labels, const Options& o) {
  const auto* values = static_cast<const int64_t*>(labels.const_data_ptr());
  for (int64_t row = 0; row < labels.size(0); ++row) {
    const int64_t label = values[row];
    AF_CHECK((label >= 0 && label < o.total_classes) || label == o.ignore_index,
             "labels: expected 0 <= label < ", o.total_classes, " or ignore_index ", o.ignore_index,
             ", got ", label, " in row ", row);
  }
}

CrossEntropyParams params_of(const Tensor& logits, const Tensor& labels, const Options& o) {
  CrossEntropyParams p{};
  p.logits = logits.const_data_ptr();
  p.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  p.rows = logits.size(0);
  p.vocab = logits.size(1);
  p.logits_row_stride = logits.stride(0);
  p.ignore_index = o.ignore_index;
  p.class_start = o.class_start;
  p.total_classes = o.total_classes;
  p.smoothing = static_cast<float>(o.smoothing);
  p.logit_scale = static_cast<float>(o.logit_scale);
  p.lse_square_scale = static_cast<float>(o.lse_square_scale);
  return p;
}

float* new_floats(OptionalTensor& storage, int64_t count, const Tensor& like) {
  storage = empty({count}, like, ScalarType::Float);
  return static_cast<float*>(storage->mutable_data_ptr());
}

struct Gradient {
  const Tensor& dlosses;
  const Tensor& logits;
  const Tensor& labels;
  const Tensor& lse;
  Options options;

  const Instance& validated_kernel() const {
    validate(logits, labels, options);
    check_per_row(dlosses, "dlosses", dtypes().fp32, "fp32", logits);
    check_per_row(lse, "lse", dtypes().fp32, "fp32", logits);
    return rowwise_kernel(logits, Family::cross_entropy, Direction::backward);
  }

  void write(const Instance& kernel, const Tensor& dlogits) const {
    const Tensor rows = contiguous_rows(logits), packed_labels = contiguous(labels),
                 packed_lse = contiguous(lse);
    CrossEntropyParams p = params_of(rows, packed_labels, options);
    p.given_lse = static_cast<const float*>(packed_lse.const_data_ptr());
    p.dlosses = static_cast<const float*>(dlosses.const_data_ptr());
    p.dlosses_stride = dlosses.stride(0);
    p.dlogits = dlogits.mutable_data_ptr();
    p.dlogits_row_stride = dlogits.stride(0);
    launch(kernel, &p, logits);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(
    const Tensor& logits, const Tensor& labels, const OptionalTensor& precomputed_lse,
    double smoothing, double logit_scale, double lse_square_scale, int64_t ignore_index,
    int64_t class_start_idx, int64_t total_classes) {
  const Options options{smoothing,    logit_scale,     lse_square_scale,
                        ignore_index, class_start_idx, total_classes};
  validate(logits, labels, options);
  if (precomputed_lse) {
    check_per_row(*precomputed_lse, "precomputed_lse", dtypes().fp32, "fp32", logits);
  }
  const Instance& kernel = rowwise_kernel(logits, Family::cross_entropy, Direction::forward);
  const Tensor rows = contiguous_rows(logits), packed_labels = contiguous(labels);
  check_labels(packed_labels, options);

  CrossEntropyParams p = params_of(rows, packed_labels, options);
  OptionalTensor given_lse, losses, z_losses, lse, workspace;
  if (precomputed_lse) {
    given_lse = contiguous(*precomputed_lse);
    p.given_lse = static_cast<const float*>(given_lse->const_data_ptr());
  }
  p.losses = new_floats(losses, p.rows, logits);
  p.z_losses = new_floats(z_losses, p.rows, logits);
  p.lse = new_floats(lse, p.rows, logits);
  const int64_t floats = cross_entropy::workspace_floats(p.rows, p.vocab);
  if (floats > 0) p.workspace = new_floats(workspace, floats, logits);
  launch(kernel, &p, logits);
  return {*losses, *z_losses, *lse};
}

Tensor cross_entropy_backward(const Tensor& dlosses, const Tensor& logits, const Tensor& labels,
                              const Tensor& lse, double smoothing, double logit_scale,
                              double lse_square_scale, int64_t ignore_index,
                              int64_t class_start_idx, int64_t total_classes) {
  const Options options{smoothing,    logit_scale,     lse_square_scale,
                        ignore_index, class_start_idx, total_classes};
  const Gradient gradient{dlosses, logits, labels, lse, options};
  const Instance& kernel = gradient.validated_kernel();
  Tensor dlogits = empty(logits.sizes(), logits, logits.scalar_type());
  gradient.write(kernel, dlogits);
  return dlogits;
}

void cross_entropy_backward_(const Tensor& dlosses, const Tensor& logits, const Tensor& labels,
                             const Tensor& lse, double smoothing, double logit_scale,
                             double lse_square_scale, int64_t ignore_index, int64_t class_start_idx,
                             int64_t total_classes) {
  const Options options{smoothing,    logit_scale,     lse_square_scale,
                        ignore_index, class_start_idx, total_classes};
  const Gradient gradient{dlosses, logits, labels, lse, options};
  const Instance& kernel = gradient.validated_kernel();
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  AF_CHECK((logits.stride(1) == 1 || vocab == 1) && (logits.stride(0) >= vocab || rows <= 1),
           "logits: expected rows of neighbouring elements that do not overlap, got strides (",
           logits.stride(0), ", ", logits.stride(1), ")");
  gradient.write(kernel, logits);
}

}  // namespace anyflash
