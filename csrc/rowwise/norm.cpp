// Layer norm and RMS norm of a sum: checks, then one launch. The words are those of
// anyflash/_operators/norm_checks.py, which also asks for one device: here that is a matter of
// course, since tensors of several never come to the CPU's operator.
#include "kernels/norm_params.h"
#include "operators.h"
#include "rowwise/output.h"
#include "rowwise/rowwise.h"
#include "stable/aten.h"
#include "stable/check.h"
#include "stable/contiguous_rows.h"
#include "stable/dtypes.h"
#include "stable/grad_mode.h"
#include "stable/launch_on.h"

namespace anyflash {
namespace {

// ---- Checks.

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return "fp16";
    case ScalarType::BFloat16:
      return "bf16";
    case ScalarType::Float:
      return "fp32";
    default:
      return "fp64";
  }
}

ScalarType dtype_of_code(const char* name, int64_t code) {
  switch (code) {
    case int64_t(Dtype::fp16):
      return ScalarType::Half;
    case int64_t(Dtype::bf16):
      return ScalarType::BFloat16;
    case int64_t(Dtype::fp32):
      return ScalarType::Float;
    case int64_t(Dtype::fp64):
      return ScalarType::Double;
    default:
      raise_runtime_error(
          text(name, ": expected 1 (fp16), 2 (bf16), 4 (fp32) or 8 (fp64), got ", code));
  }
}

Dtype kernel_dtype(ScalarType dtype) {
  if (dtype == ScalarType::Half) return Dtype::fp16;
  return dtype == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::fp32;
}

bool is_fp64(const Tensor& x) { return dtype_of(x) == dtypes().fp64; }

const char* dtypes_beside(const Tensor& x) { return is_fp64(x) ? "fp64" : "fp16, bf16 or fp32"; }

// fp16, bf16 and fp32 mix; fp64 does not mix with them.
void check_dtype(const char* name, const Tensor& tensor, const Tensor& x) {
  const int32_t dtype = dtype_of(tensor);
  AF_CHECK(dtypes().is_floating(dtype) && is_fp64(tensor) == is_fp64(x), name, ": expected ",
           dtypes_beside(x), " beside x of ", dtype_text(x), ", got ", dtype_text(tensor));
}

void check_dtype(const char* name, ScalarType dtype, const Tensor& x) {
  AF_CHECK((dtype == ScalarType::Double) == is_fp64(x), name, ": expected ", dtypes_beside(x),
           " beside x of ", dtype_text(x), ", got ", name_of(dtype));
}

void check_same_dtype(const char* name, const OptionalTensor& tensor, ScalarType dtype,
                      const char* of) {
  if (!tensor) return;
  AF_CHECK(tensor->scalar_type() == dtype, name, ": expected ", of, "'s dtype ", name_of(dtype),
           ", got ", dtype_text(*tensor));
}

void check_shape(const char* name, const Tensor& tensor, const Tensor& x) {
  bool same = tensor.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = tensor.size(i) == x.size(i);
  AF_CHECK(same, name, ": expected x's shape ", shape_text(x), ", got ", shape_text(tensor));
}

void check_like(const char* name, const OptionalTensor& tensor, const Tensor& x) {
  if (!tensor) return;
  check_shape(name, *tensor, x);
  check_dtype(name, *tensor, x);
}

int64_t columns_of(const Tensor& x) { return x.size(x.dim() - 1); }
int64_t rows_of(const Tensor& x) { return x.numel() / columns_of(x); }

void check_vector(const char* name, const OptionalTensor& vector, const Tensor& x) {
  if (!vector) return;
  AF_CHECK(vector->dim() == 1 && vector->size(0) == columns_of(x), name, ": expected (",
           columns_of(x), ",), x's last dimension, got ", shape_text(*vector));
  check_dtype(name, *vector, x);
}

void check_per_row(const char* name, const OptionalTensor& tensor, const Tensor& x) {
  if (!tensor) return;
  AF_CHECK(tensor->numel() == rows_of(x), name, ": expected ", rows_of(x),
           " numbers, one per row of x ", shape_text(x), ", got ", shape_text(*tensor));
  check_dtype(name, *tensor, x);
}

void check_mask(const char* name, const OptionalTensor& mask, const Tensor& x) {
  if (!mask) return;
  AF_CHECK(dtype_of(*mask) == dtypes().boolean, name, ": expected bool, got ", dtype_text(*mask));
  check_shape(name, *mask, x);
}

// What both directions take, in the order of the schemas.
struct Shared {
  const Tensor& weight;
  const OptionalTensor& bias;
  const OptionalTensor& weight1;
  const OptionalTensor& bias1;
  const OptionalTensor& rowscale;
  const OptionalTensor& mask;
  const OptionalTensor& mask1;
  double dropout_p;
  bool is_rms_norm;
  bool zero_centered_weight;
};

void check_shared(const Shared& args, const Tensor& x, bool has_x1) {
  AF_CHECK(dtypes().is_floating(dtype_of(x)), "x: expected fp16, bf16, fp32 or fp64, got ",
           dtype_text(x));
  AF_CHECK(x.dim() >= 1 && columns_of(x) >= 1,
           "x: expected (..., columns) with at least one column, got ", shape_text(x));
  check_vector("weight", args.weight, x);
  check_vector("bias", args.bias, x);
  check_vector("weight1", args.weight1, x);
  check_vector("bias1", args.bias1, x);
  AF_CHECK(!args.bias1 || args.weight1, "bias1: expected weight1 with it, got bias1 alone");
  AF_CHECK(!args.rowscale || !has_x1,
           "rowscale is not supported with parallel LayerNorm: expected none beside x1");
  check_per_row("rowscale", args.rowscale, x);
  check_mask("dropout_mask", args.mask, x);
  check_mask("dropout_mask1", args.mask1, x);
  AF_CHECK(args.mask1.has_value() == (has_x1 && args.mask),
           "dropout_mask1: expected one where there are x1 and dropout_mask, and else none, got ",
           args.mask1 ? "one" : "none");
  AF_CHECK(args.dropout_p >= 0 && args.dropout_p < 1,
           "dropout_p: expected a number in [0, 1), got ", args.dropout_p);
}

void check_gradients(const Tensor& dy, const OptionalTensor& dy1,
                     const OptionalTensor& dresidual_out, const Tensor& z, bool has_weight1) {
  check_like("dy", dy, z);
  check_like("dy1", dy1, z);
  check_same_dtype("dy1", dy1, dy.scalar_type(), "dy");
  check_like("dresidual_out", dresidual_out, z);
  check_same_dtype("dresidual_out", dresidual_out, z.scalar_type(), "z");
  AF_CHECK(!dy1 || has_weight1, "dy1: expected weight1 with it, got dy1 alone");
}

void check_statistics(const char* name, const Tensor& statistics, const Tensor& z) {
  check_per_row(name, statistics, z);
  check_same_dtype(name, statistics, is_fp64(z) ? ScalarType::Double : ScalarType::Float,
                   "the statistics");
}

// ---- Tensors as the kernel takes them. Copies that this needs live as long as the object.

class Arguments {
 public:
  Arguments(const Shared& args, const Tensor& x) {
    params.rows = rows_of(x);
    params.cols = columns_of(x);
    params.keep_scale = static_cast<float>(1 / (1 - args.dropout_p));
    params.weight_offset = args.zero_centered_weight ? 1.0f : 0.0f;
    params.is_rms_norm = args.is_rms_norm;
    params.weight = vector(args.weight);
    params.bias = vector(args.bias);
    params.weight1 = vector(args.weight1);
    params.bias1 = vector(args.bias1);
    params.rowscale = vector(args.rowscale);
    params.mask = rows<const uint8_t>(args.mask);
    params.mask1 = rows<const uint8_t>(args.mask1);
  }

  template <class T = const void>
  NormRows<T> rows(const OptionalTensor& tensor) {
    if (!tensor) return {};
    const StoredMatrix matrix(*tensor);
    kept_.push_back(matrix.storage);
    return {static_cast<T*>(matrix.storage.const_data_ptr()), matrix.stride};
  }

  // A row of fp32 numbers.
  const float* vector(const OptionalTensor& tensor) {
    if (!tensor) return nullptr;
    kept_.push_back(contiguous(to_dtype(*tensor, ScalarType::Float)));
    return static_cast<const float*>(kept_.back().const_data_ptr());
  }

  NormParams params{};

 private:
  std::vector<Tensor> kept_;
};

NormRows<void> rows_to_write(const Tensor& tensor) {
  if (tensor.numel() == 0) return {};
  return {tensor.mutable_data_ptr(), columns_of(tensor)};
}

float* numbers_to_write(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<float*>(tensor.mutable_data_ptr());
}

// x's shape where it is wanted, else empty.
Tensor like_if(bool wanted, const Tensor& x, ScalarType dtype) {
  return wanted ? empty_output(x.sizes(), x, dtype) : empty({0}, x, dtype);
}

// Sums for the gradient of a parameter; `finished` gives them its dtype.
Tensor sums_for(const OptionalTensor& parameter, const Tensor& x) {
  return empty({parameter ? parameter->numel() : 0}, x, ScalarType::Float);
}

Tensor finished(const Tensor& sums, const OptionalTensor& parameter, const Tensor& x) {
  return parameter ? to_dtype(sums, parameter->scalar_type()) : empty({0}, x, x.scalar_type());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_forward(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& x1, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& weight1, const OptionalTensor& bias1,
    const OptionalTensor& rowscale, const OptionalTensor& dropout_mask,
    const OptionalTensor& dropout_mask1, double dropout_p, double eps, bool is_rms_norm,
    bool zero_centered_weight, int64_t out_dtype, int64_t residual_dtype) {
  const NoGrad no_grad;
  const Shared shared{weight,       bias,          weight1,   bias1,       rowscale,
                      dropout_mask, dropout_mask1, dropout_p, is_rms_norm, zero_centered_weight};
  check_shared(shared, x, x1.has_value());
  check_like("residual", residual, x);
  check_like("x1", x1, x);
  check_same_dtype("x1", x1, x.scalar_type(), "x");
  const ScalarType y_dtype = dtype_of_code("out_dtype", out_dtype);
  check_dtype("out_dtype", y_dtype, x);
  const bool stored = residual_dtype != 0;
  ScalarType z_dtype = residual ? residual->scalar_type() : x.scalar_type();
  if (stored) {
    z_dtype = dtype_of_code("residual_dtype", residual_dtype);
    check_dtype("residual_dtype", z_dtype, x);
    check_same_dtype("residual", residual, z_dtype, "residual_out");
  }
  const Instance& kernel = rowwise_kernel(x, Family::norm, Direction::forward);

  const Tensor y = empty_output(x.sizes(), x, y_dtype),
               y1 = like_if(weight1.has_value(), x, y_dtype);
  const Tensor residual_out = like_if(stored, x, stored ? z_dtype : x.scalar_type());
  const Sizes leading = x.sizes().slice(0, x.dim() - 1);
  const Tensor rstd = empty(leading, x, ScalarType::Float);
  const Tensor mean =
      is_rms_norm ? empty({0}, x, ScalarType::Float) : empty(leading, x, ScalarType::Float);
  if (x.numel() == 0) return {y, y1, residual_out, mean, rstd};
  Arguments arguments(shared, x);
  NormParams& p = arguments.params;
  p.eps = static_cast<float>(eps);
  p.sum_dtype = kernel_dtype(z_dtype);
  p.out_dtype = kernel_dtype(y_dtype);
  p.x = arguments.rows(x);
  p.x1 = arguments.rows(x1);
  p.residual = arguments.rows(residual);
  p.mean = numbers_to_write(mean);
  p.rstd = numbers_to_write(rstd);
  p.y = rows_to_write(y);
  p.y1 = rows_to_write(y1);
  p.residual_out = rows_to_write(residual_out);
  launch(kernel, &p, x);
  return {y, y1, residual_out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_backward(
    const Tensor& dy, const OptionalTensor& dy1, const OptionalTensor& dresidual_out,
    const Tensor& z, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& weight1, const OptionalTensor& bias1,
    const OptionalTensor& rowscale, const OptionalTensor& dropout_mask,
    const OptionalTensor& dropout_mask1, const OptionalTensor& x, double dropout_p,
    bool is_rms_norm, bool zero_centered_weight, bool has_residual, bool has_x1, int64_t x_dtype) {
  const NoGrad no_grad;
  const Shared shared{weight,       bias,          weight1,   bias1,       rowscale,
                      dropout_mask, dropout_mask1, dropout_p, is_rms_norm, zero_centered_weight};
  check_shared(shared, z, has_x1);
  check_gradients(dy, dy1, dresidual_out, z, weight1.has_value());
  check_statistics("rstd", rstd, z);
  if (!is_rms_norm) check_statistics("mean", mean, z);
  const ScalarType dtype = dtype_of_code("x_dtype", x_dtype);
  check_dtype("x_dtype", dtype, z);
  const OptionalTensor scaled = rowscale ? x : std::nullopt;
  check_like("x", scaled, z);
  check_same_dtype("x", scaled, dtype, "dx");

  const bool masked = dropout_mask.has_value();
  const bool own_dresidual = masked || rowscale || dtype != z.scalar_type();
  const Tensor dx = empty_output(z.sizes(), z, dtype), dx1 = like_if(has_x1 && masked, z, dtype);
  const Tensor dresidual = like_if(has_residual && own_dresidual, z, z.scalar_type());
  const Tensor dweight = sums_for(weight, z), dbias = sums_for(bias, z);
  const Tensor dweight1 = sums_for(weight1, z), dbias1 = sums_for(bias1, z);
  const Tensor drowscale = sums_for(scaled ? rowscale : std::nullopt, z);
  const Instance& kernel = rowwise_kernel(dx, Family::norm, Direction::backward);
  if (z.numel() == 0) {
    for (const Tensor* sums : {&dweight, &dbias, &dweight1, &dbias1}) fill_(*sums, 0.0);
  } else {
    Arguments arguments(shared, z);
    NormParams& p = arguments.params;
    p.sum_dtype = kernel_dtype(z.scalar_type());
    p.out_dtype = kernel_dtype(dy.scalar_type());
    p.mean = is_rms_norm ? nullptr : const_cast<float*>(arguments.vector(mean));
    p.rstd = const_cast<float*>(arguments.vector(rstd));
    p.x = arguments.rows(scaled);
    p.z = arguments.rows(z);
    p.dy = arguments.rows(dy);
    p.dy1 = arguments.rows(dy1);
    p.dresidual_out = arguments.rows(dresidual_out);
    p.dx = rows_to_write(dx);
    p.dx1 = rows_to_write(dx1);
    p.dresidual = rows_to_write(dresidual);
    p.dweight = numbers_to_write(dweight);
    p.dbias = numbers_to_write(dbias);
    p.dweight1 = numbers_to_write(dweight1);
    p.dbias1 = numbers_to_write(dbias1);
    p.drowscale = numbers_to_write(drowscale);
    const Tensor workspace = empty({norm_workspace_floats(p)}, z, ScalarType::Float);
    p.workspace = numbers_to_write(workspace);
    launch(kernel, &p, z);
  }
  const Tensor dscale =
      scaled ? reshape(to_dtype(drowscale, rowscale->scalar_type()), rowscale->sizes())
             : empty({0}, z, z.scalar_type());
  return {dx,
          dx1,
          dresidual,
          finished(dweight, weight, z),
          finished(dbias, bias, z),
          finished(dweight1, weight1, z),
          finished(dbias1, bias1, z),
          dscale};
}

}  // namespace anyflash
