#include <cmath>

#include "core/checks.h"
#include "core/cross_entropy.h"

namespace anyflash {
namespace {

// One number per row of logits.
void check_per_row(const TensorView& x, const char* name, ElementType dtype,
                   const TensorView& logits) {
  AF_CHECK(x.dtype == dtype, name, ": expected ", dtype_name(dtype), ", got ", dtype_text(x));
  AF_CHECK(has_shape(x, {logits.size(0)}), name, ": expected (", logits.size(0),
           ",), one per row of logits, got ", shape_text(x));
  check_same_device(logits, "logits", x, name);
  check_allocated(x, name);
}

void check_options(const CrossEntropyCall& call) {
  AF_CHECK(call.smoothing >= 0 && call.smoothing < 1, "label_smoothing: expected 0 <= it < 1, got ",
           call.smoothing);
  // As the kernel takes it.
  const double scale = call.logits.dtype == ElementType::fp64
                           ? call.logit_scale
                           : static_cast<float>(call.logit_scale);
  AF_CHECK(scale > 0 && std::isfinite(scale), "logit_scale: expected a positive number, got ",
           call.logit_scale);
  AF_CHECK(std::isfinite(call.lse_square_scale), "lse_square_scale: expected a finite number, got ",
           call.lse_square_scale);
  const int64_t vocab = call.logits.size(1);
  AF_CHECK(call.class_start >= 0 && call.class_start <= call.total_classes - vocab,
           "total_classes: expected at least class_start_idx ", call.class_start, " + vocab ",
           vocab, ", got ", call.total_classes);
}

void check_labels(const CrossEntropyCall& call) {
  const Integers labels(call.labels);
  for (int64_t row = 0; row < labels.size(); ++row) {
    const int64_t label = labels[row];
    AF_CHECK((label >= 0 && label < call.total_classes) || label == call.ignore_index,
             "labels: expected 0 <= label < ", call.total_classes, " or ignore_index ",
             call.ignore_index, ", got ", label, " in row ", row);
  }
}

void check_own_rows(const TensorView& logits) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  AF_CHECK((logits.stride(1) == 1 || vocab == 1) && (logits.stride(0) >= vocab || rows <= 1),
           "logits: expected rows of neighbouring elements that do not overlap, got strides (",
           logits.stride(0), ", ", logits.stride(1), ")");
}

}  // namespace

void check_cross_entropy(const CrossEntropyCall& call) {
  const TensorView& logits = call.logits;
  AF_CHECK(is_floating(logits.dtype), "logits: expected fp16, bf16, fp32 or fp64, got ",
           dtype_text(logits));
  AF_CHECK(logits.rank == 2 && logits.size(1) > 0,
           "logits: expected (rows, vocab) with at least one class, got ", shape_text(logits));
  check_allocated(logits, "logits");
  check_per_row(call.labels, "labels", ElementType::int64, logits);
  check_options(call);
  const bool backward = call.dlosses.given();
  const ElementType statistics =
      logits.dtype == ElementType::fp64 ? ElementType::fp64 : ElementType::fp32;
  if (backward) check_per_row(call.dlosses, "dlosses", statistics, logits);
  if (call.lse.given()) {
    check_per_row(call.lse, backward ? "lse" : "precomputed_lse", statistics, logits);
  }
  if (call.in_place) check_own_rows(logits);
  if (!backward && call.labels.host != nullptr) check_labels(call);
}

}  // namespace anyflash
