#include "core/checks.h"
#include "core/rotary.h"

namespace anyflash {
namespace {

void check_table(const TensorView& table, const char* name, const TensorView& x) {
  AF_CHECK(is_floating(table.dtype), name, ": expected a floating dtype, got ", dtype_text(table));
  check_same_device(x, "x", table, name);
  AF_CHECK(table.rank == 2, name, ": expected (seqlen_rotary, rotary_dim / 2), got ",
           shape_text(table));
  check_allocated(table, name);
}

void check_integers(const TensorView& tensor, const char* name, const TensorView& x) {
  AF_CHECK(tensor.dtype == ElementType::int32 || tensor.dtype == ElementType::int64, name,
           ": expected int32 or int64, got ", dtype_text(tensor));
  check_same_device(x, "x", tensor, name);
  AF_CHECK(tensor.rank == 1, name, ": expected one dimension, got ", shape_text(tensor));
  check_allocated(tensor, name);
}

void check_offsets(const TensorView& offsets, const TensorView& x, int64_t batch) {
  check_integers(offsets, "seqlen_offsets", x);
  AF_CHECK(offsets.size(0) == batch, "seqlen_offsets: expected (batch,) = (", batch, ",), got ",
           shape_text(offsets));
  if (offsets.host != nullptr) check_not_negative(Integers(offsets), "seqlen_offsets");
}

}  // namespace

void check_rotary(const RotaryCall& call) {
  const TensorView &x = call.x, &cos = call.cos, &sin = call.sin, &cu = call.cu_seqlens;
  AF_CHECK(is_floating(x.dtype), "x: expected fp16, bf16, fp32 or fp64, got ", dtype_text(x));
  AF_CHECK(x.rank == (call.packed() ? 3 : 4), "x: expected ",
           call.packed() ? "(total, heads, head_dim) with cu_seqlens"
                         : "(batch, seqlen, heads, head_dim)",
           ", got ", shape_text(x));
  check_allocated(x, "x");
  check_table(cos, "cos", x);
  check_table(sin, "sin", x);
  AF_CHECK(has_shape(sin, {cos.size(0), cos.size(1)}), "sin: expected cos' ", shape_text(cos),
           ", got ", shape_text(sin));
  AF_CHECK(2 * cos.size(1) <= x.size(-1),
           "rotary_dim must be <= headdim, got cos with rotary_dim / 2 = ", cos.size(1), " for x ",
           shape_text(x));

  int64_t batch = x.size(0), longest = x.size(1);
  if (call.packed()) {
    check_integers(cu, "cu_seqlens", x);
    AF_CHECK(cu.size(0) > 0, "cu_seqlens: expected (batch + 1,), got (0,)");
    AF_CHECK(call.max_seqlen >= 0, "max_seqlen: expected 0 or more, got ", call.max_seqlen);
    if (cu.host != nullptr) {
      check_cumulative(Integers(cu), "cu_seqlens", &x, "x", call.max_seqlen, "max_seqlen");
    }
    batch = cu.size(0) - 1;
    longest = call.max_seqlen;
  }
  AF_CHECK(call.seqlen_offset >= 0, "seqlen_offsets: expected 0 or more, got ", call.seqlen_offset);
  if (call.seqlen_offsets.given()) check_offsets(call.seqlen_offsets, x, batch);
  AF_CHECK(longest <= cos.size(0) - call.seqlen_offset,
           "seqlen_ro must be >= seqlen: cos and sin have ", cos.size(0), " rows, x takes ",
           longest, " from row ", call.seqlen_offset, " on");
  if (call.in_place) {
    check_no_self_overlap(x, "x");
    check_no_overlap(x, "x", cos, "cos");
    check_no_overlap(x, "x", sin, "sin");
  }
}

}  // namespace anyflash
