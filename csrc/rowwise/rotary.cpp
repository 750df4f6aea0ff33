#include <vector>

#include "core/run.h"
#include "kernels/rotary_params.h"
#include "operators.h"
#include "rowwise/rowwise.h"
#include "stable/check.h"
#include "stable/contiguous_rows.h"
#include "stable/dtypes.h"
#include "stable/launch_on.h"
#include "stable/view.h"

namespace anyflash {
namespace {

void check_like_x(const Tensor& tensor, const char* name, const Tensor& x) {
  AF_CHECK(device_text(tensor) == device_text(x), name, ": expected x's ", device_text(x), ", got ",
           device_text(tensor));
}

void check_tables(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const auto check = [&x](const char* name, const Tensor& table) {
    AF_CHECK(dtypes().is_floating(dtype_of(table)), name, ": expected a floating dtype, got ",
             dtype_text(table));
    check_like_x(table, name, x);
    AF_CHECK(table.dim() == 2, name, ": expected (seqlen_rotary, rotary_dim / 2), got ",
             shape_text(table));
  };
  check("cos", cos);
  check("sin", sin);
  AF_CHECK(sin.size(0) == cos.size(0) && sin.size(1) == cos.size(1), "sin: expected cos' ",
           shape_text(cos), ", got ", shape_text(sin));
  AF_CHECK(2 * cos.size(1) <= x.size(x.dim() - 1),
           "rotary_dim must be <= headdim, got cos with rotary_dim / 2 = ", cos.size(1), " for x ",
           shape_text(x));
}

// The numbers of an int32 or int64 tensor on the CPU; none without a tensor.
std::vector<int64_t> numbers(const OptionalTensor& tensor, const char* name, const Tensor& x) {
  if (!tensor) return {};
  const int32_t dtype = dtype_of(*tensor);
  AF_CHECK(dtype == dtypes().int32 || dtype == dtypes().int64, name,
           ": expected int32 or int64, got ", dtype_text(*tensor));
  check_like_x(*tensor, name, x);
  AF_CHECK(tensor->dim() == 1, name, ": expected one dimension, got ", shape_text(*tensor));
  std::vector<int64_t> result(static_cast<size_t>(tensor->size(0)));
  const int64_t stride = tensor->stride(0);
  const void* data = tensor->const_data_ptr();
  for (size_t i = 0; i < result.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i) * stride;
    result[i] = dtype == dtypes().int64 ? static_cast<const int64_t*>(data)[at]
                                        : static_cast<const int32_t*>(data)[at];
  }
  return result;
}

void check_cu_seqlens(const std::vector<int64_t>& cu, int64_t max_seqlen, int64_t rows) {
  AF_CHECK(!cu.empty(), "cu_seqlens: expected (batch + 1,), got (0,)");
  AF_CHECK(max_seqlen >= 0, "max_seqlen: expected 0 or more, got ", max_seqlen);
  AF_CHECK(cu[0] == 0, "cu_seqlens: expected to start at 0, got ", cu[0]);
  for (size_t i = 0; i + 1 < cu.size(); ++i) {
    AF_CHECK(cu[i + 1] >= cu[i], "cu_seqlens: must not decrease, got ", cu[i], " and then ",
             cu[i + 1], " at index ", i + 1);
    AF_CHECK(cu[i + 1] - cu[i] <= max_seqlen, "max_seqlen: expected at least ", cu[i + 1] - cu[i],
             ", the length of sequence ", i, " in cu_seqlens, got ", max_seqlen);
  }
  AF_CHECK(cu.back() <= rows, "cu_seqlens: ends at ", cu.back(), ", but x has ", rows, " rows");
}

// The angles and positions of a call, checked against x, with what had to be converted for them.
class Rotation {
 public:
  Rotation(const Tensor& x, const Tensor& cos, const Tensor& sin,
           const OptionalTensor& seqlen_offsets, int64_t seqlen_offset,
           const OptionalTensor& cu_seqlens, int64_t max_seqlen, bool interleaved, bool conjugate)
      : packed_(cu_seqlens.has_value()) {
    AF_CHECK(
        x.dim() == (packed_ ? 3 : 4), "x: expected ",
        packed_ ? "(total, heads, head_dim) with cu_seqlens" : "(batch, seqlen, heads, head_dim)",
        ", got ", shape_text(x));
    check_tables(x, cos, sin);
    set_sequences(x, seqlen_offsets, seqlen_offset, cu_seqlens, max_seqlen, cos);
    set_tables(x, cos, sin);
    params_.heads = x.size(x.dim() - 2);
    params_.head_dim = x.size(x.dim() - 1);
    params_.interleaved = interleaved;
    params_.conjugate = conjugate;
  }

  // y = x turned, both with rows that the kernel can read; y may be x.
  void run(const Tensor& x, const Tensor& y) {
    if (x.numel() == 0) return;
    params_.x = rows_of(view_of(x));
    params_.y = rows_of(view_to_write(y));
    launch(rowwise_kernel(x, Family::rotary, Direction::forward), &params_, x);
  }

 private:
  void set_sequences(const Tensor& x, const OptionalTensor& seqlen_offsets, int64_t seqlen_offset,
                     const OptionalTensor& cu_seqlens, int64_t max_seqlen, const Tensor& cos) {
    cu_seqlens_ = numbers(cu_seqlens, "cu_seqlens", x);
    if (packed_) check_cu_seqlens(cu_seqlens_, max_seqlen, x.size(0));
    params_.batch = packed_ ? static_cast<int64_t>(cu_seqlens_.size()) - 1 : x.size(0);
    params_.seqlen = packed_ ? x.size(0) : x.size(1);
    AF_CHECK(seqlen_offset >= 0, "seqlen_offsets: expected 0 or more, got ", seqlen_offset);
    offsets_ = numbers(seqlen_offsets, "seqlen_offsets", x);
    if (seqlen_offsets) {
      AF_CHECK(seqlen_offsets->size(0) == params_.batch, "seqlen_offsets: expected (batch,) = (",
               params_.batch, ",), got ", shape_text(*seqlen_offsets));
    }
    for (size_t i = 0; i < offsets_.size(); ++i) {
      AF_CHECK(offsets_[i] >= 0, "seqlen_offsets: expected 0 or more, got ", offsets_[i],
               " for sequence ", i);
    }
    const int64_t longest = packed_ ? max_seqlen : x.size(1);
    AF_CHECK(longest <= cos.size(0) - seqlen_offset,
             "seqlen_ro must be >= seqlen: cos and sin have ", cos.size(0), " rows, x takes ",
             longest, " from row ", seqlen_offset, " on");
    params_.cu_seqlens = packed_ ? cu_seqlens_.data() : nullptr;
    params_.seqlen_offsets = seqlen_offsets ? offsets_.data() : nullptr;
    params_.seqlen_offset = seqlen_offset;
    params_.seqlen_rotary = cos.size(0);
    params_.pairs = cos.size(1);
  }

  void set_tables(const Tensor& x, const Tensor& cos, const Tensor& sin) {
    const bool like_x = dtype_of(cos) == dtype_of(x) && dtype_of(sin) == dtype_of(x);
    const auto table = [like_x](const Tensor& given) {
      return contiguous_rows(like_x ? given : to_dtype(given, ScalarType::Float));
    };
    cos_ = table(cos);
    sin_ = table(sin);
    params_.tables_are_fp32 = !like_x;
    params_.cos = cos_->const_data_ptr();
    params_.sin = sin_->const_data_ptr();
    params_.cos_stride = cos_->stride(0);
    params_.sin_stride = sin_->stride(0);
  }

  bool packed_;
  std::vector<int64_t> cu_seqlens_, offsets_;
  OptionalTensor cos_, sin_;
  RotaryParams params_{};
};

// Room for the result: x's strides where its columns lie side by side. empty_like may put another
// dimension innermost where elements of x overlap.
Tensor layout_like(const Tensor& x) {
  const Tensor y = empty_like(x);
  const int64_t last = y.dim() - 1;
  return y.size(last) > 1 && y.stride(last) != 1 ? empty(x.sizes(), x, x.scalar_type()) : y;
}

}  // namespace

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin,
              const OptionalTensor& seqlen_offsets, int64_t seqlen_offset,
              const OptionalTensor& cu_seqlens, int64_t max_seqlen, bool interleaved,
              bool conjugate) {
  Rotation rotation(x, cos, sin, seqlen_offsets, seqlen_offset, cu_seqlens, max_seqlen, interleaved,
                    conjugate);
  const Tensor readable = contiguous_rows(x);
  const Tensor y = layout_like(readable);
  rotation.run(readable, y);
  return y;
}

void rotary_(const Tensor& x, const Tensor& cos, const Tensor& sin,
             const OptionalTensor& seqlen_offsets, int64_t seqlen_offset,
             const OptionalTensor& cu_seqlens, int64_t max_seqlen, bool interleaved,
             bool conjugate) {
  Rotation rotation(x, cos, sin, seqlen_offsets, seqlen_offset, cu_seqlens, max_seqlen, interleaved,
                    conjugate);
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    AF_CHECK(x.stride(dim) != 0 || x.size(dim) <= 1,
             "x: expected memory of its own for every element, got stride 0 in dimension ", dim);
  }
  const Tensor readable = contiguous_rows(x);
  rotation.run(readable, readable);
  if (readable.stride(readable.dim() - 1) != x.stride(x.dim() - 1)) copy_(x, readable);
}

}  // namespace anyflash
