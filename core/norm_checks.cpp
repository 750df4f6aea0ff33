#include "core/checks.h"
#include "core/norm.h"

namespace anyflash {
namespace {

bool is_fp64(ElementType dtype) { return dtype == ElementType::fp64; }

// fp16, bf16 and fp32 mix; fp64 does not mix with them.
void check_dtype(const char* name, ElementType dtype, const TensorView& x) {
  AF_CHECK(is_floating(dtype) && is_fp64(dtype) == is_fp64(x.dtype), name, ": expected ",
           is_fp64(x.dtype) ? "fp64" : "fp16, bf16 or fp32", " beside x of ", dtype_text(x),
           ", got ", dtype_name(dtype));
}

ElementType dtype_of_code(const char* name, int64_t code, const TensorView& x) {
  AF_CHECK(code == 1 || code == 2 || code == 4 || code == 8, name,
           ": expected 1 (fp16), 2 (bf16), 4 (fp32) or 8 (fp64), got ", code);
  const auto dtype = static_cast<ElementType>(code);
  check_dtype(name, dtype, x);
  return dtype;
}

void check_same_dtype(const char* name, const TensorView& tensor, ElementType dtype,
                      const char* of) {
  AF_CHECK(!tensor.given() || tensor.dtype == dtype, name, ": expected ", of, "'s dtype ",
           dtype_name(dtype), ", got ", dtype_text(tensor));
}

bool has_shape_of(const TensorView& x, const TensorView& tensor) {
  bool same = tensor.rank == x.rank;
  for (int32_t i = 0; same && i < x.rank; ++i) same = tensor.sizes[i] == x.sizes[i];
  return same;
}

void check_place(const char* name, const TensorView& tensor, const TensorView& x) {
  check_same_device(x, "x", tensor, name);
  check_allocated(tensor, name);
}

// A floating tensor of x's shape.
void check_like(const char* name, const TensorView& tensor, const TensorView& x) {
  if (!tensor.given()) return;
  AF_CHECK(has_shape_of(x, tensor), name, ": expected x's shape ", shape_text(x), ", got ",
           shape_text(tensor));
  check_dtype(name, tensor.dtype, x);
  check_place(name, tensor, x);
}

void check_vector(const char* name, const TensorView& vector, const TensorView& x) {
  if (!vector.given()) return;
  AF_CHECK(has_shape(vector, {x.size(-1)}), name, ": expected (", x.size(-1),
           ",), x's last dimension, got ", shape_text(vector));
  check_dtype(name, vector.dtype, x);
  check_place(name, vector, x);
}

void check_per_row(const char* name, const TensorView& tensor, const TensorView& x) {
  if (!tensor.given()) return;
  const int64_t rows = x.numel() / x.size(-1);
  AF_CHECK(tensor.rank <= kMaxRank && tensor.numel() == rows, name, ": expected ", rows,
           " numbers, one per row of x ", shape_text(x), ", got ", shape_text(tensor));
  check_dtype(name, tensor.dtype, x);
  check_place(name, tensor, x);
}

void check_mask(const char* name, const TensorView& mask, const TensorView& x) {
  if (!mask.given()) return;
  AF_CHECK(mask.dtype == ElementType::boolean, name, ": expected bool, got ", dtype_text(mask));
  AF_CHECK(has_shape_of(x, mask), name, ": expected x's shape ", shape_text(x), ", got ",
           shape_text(mask));
  check_place(name, mask, x);
}

// What both directions take, `x` being a tensor like x.
void check_shared(const NormCall& call, const TensorView& x, bool has_x1) {
  AF_CHECK(is_floating(x.dtype), "x: expected fp16, bf16, fp32 or fp64, got ", dtype_text(x));
  AF_CHECK(x.rank <= kMaxRank, "x: expected at most ", kMaxRank, " dimensions, got ", x.rank);
  AF_CHECK(x.rank >= 1 && x.size(-1) >= 1,
           "x: expected (..., columns) with at least one column, got ", shape_text(x));
  check_allocated(x, "x");
  check_vector("weight", call.weight, x);
  check_vector("bias", call.bias, x);
  check_vector("weight1", call.weight1, x);
  check_vector("bias1", call.bias1, x);
  AF_CHECK(!call.bias1.given() || call.weight1.given(),
           "bias1: expected weight1 with it, got bias1 alone");
  AF_CHECK(!call.rowscale.given() || !has_x1,
           "rowscale is not supported with parallel LayerNorm: expected none beside x1");
  check_per_row("rowscale", call.rowscale, x);
  check_mask("dropout_mask", call.dropout_mask, x);
  check_mask("dropout_mask1", call.dropout_mask1, x);
  AF_CHECK(call.dropout_mask1.given() == (has_x1 && call.dropout_mask.given()),
           "dropout_mask1: expected one where there are x1 and dropout_mask, and else none, got ",
           call.dropout_mask1.given() ? "one" : "none");
  AF_CHECK(call.dropout_p >= 0 && call.dropout_p < 1,
           "dropout_p: expected a number in [0, 1), got ", call.dropout_p);
}

void check_forward(const NormCall& call) {
  const TensorView& x = call.x;
  check_shared(call, x, call.x1.given());
  check_like("residual", call.residual, x);
  check_like("x1", call.x1, x);
  check_same_dtype("x1", call.x1, x.dtype, "x");
  dtype_of_code("out_dtype", call.out_dtype, x);
  if (call.residual_dtype != 0) {
    const ElementType dtype = dtype_of_code("residual_dtype", call.residual_dtype, x);
    check_same_dtype("residual", call.residual, dtype, "residual_out");
  }
}

void check_statistics(const char* name, const TensorView& statistics, const TensorView& z) {
  check_per_row(name, statistics, z);
  check_same_dtype(name, statistics, is_fp64(z.dtype) ? ElementType::fp64 : ElementType::fp32,
                   "the statistics");
}

void check_backward(const NormCall& call, const NormGradient& grad) {
  const TensorView& z = grad.z;
  check_shared(call, z, grad.has_x1);
  check_like("dy", grad.dy, z);
  check_like("dy1", grad.dy1, z);
  check_same_dtype("dy1", grad.dy1, grad.dy.dtype, "dy");
  check_like("dresidual_out", grad.dresidual_out, z);
  check_same_dtype("dresidual_out", grad.dresidual_out, z.dtype, "z");
  AF_CHECK(!grad.dy1.given() || call.weight1.given(),
           "dy1: expected weight1 with it, got dy1 alone");
  check_statistics("rstd", grad.rstd, z);
  if (!call.is_rms_norm) check_statistics("mean", grad.mean, z);
  const ElementType dtype = dtype_of_code("x_dtype", grad.x_dtype, z);
  if (call.rowscale.given()) {
    check_like("x", call.x, z);
    check_same_dtype("x", call.x, dtype, "dx");
  }
}

}  // namespace

void check_norm(const NormCall& call, const NormGradient* grad) {
  if (grad == nullptr) {
    check_forward(call);
  } else {
    check_backward(call, *grad);
  }
}

}  // namespace anyflash
