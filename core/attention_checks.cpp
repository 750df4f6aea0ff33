#include "core/attention_checks.h"

#include <array>
#include <cmath>
#include <optional>

namespace anyflash {
namespace {

void check_heads(int64_t heads, int64_t heads_k, const char* k_name) {
  AF_CHECK(heads > 0 && heads_k > 0 && heads % heads_k == 0,
           "Number of heads in key/value must divide number of heads in query, got ", heads_k,
           " heads in ", k_name, " and ", heads, " in q");
}

void check_head_dim(const char* name, int64_t head_dim, const char* direction) {
  AF_CHECK(head_dim <= kMaxHeadDim, "FlashAttention ", direction,
           " only supports head dimension at most 256 (anyflash: ", kMaxHeadDim, "), got ", name,
           " with head_dim ", head_dim);
  AF_CHECK(head_dim > 0, name, ": expected a head_dim of 1 to ", kMaxHeadDim, ", got ", head_dim);
}

void check_query(const AttentionCall& call) {
  const TensorView& q = call.q;
  // Ranks first: everything after counts dimensions.
  if (call.packed()) {
    AF_CHECK(q.rank == 3, "q: expected (total_q, heads, head_dim) with cu_seqlens_q, got ",
             shape_text(q));
  } else {
    AF_CHECK(q.rank == 4, "q: expected (batch, seqlen_q, heads, head_dim), got ", shape_text(q));
  }
  AF_CHECK(
      is_floating(q.dtype),
      "FlashAttention only support fp16 and bf16 data type (anyflash: fp32 and fp64 too), got ",
      "q of ", dtype_text(q));
}

// k and v: dtype, device, layout and shape, which a message writes down as the original library
// does.
void check_keys(const AttentionCall& call, const KeyNames& names) {
  const TensorView &q = call.q, &k = call.k, &v = call.v;
  AF_CHECK(k.dtype == q.dtype, "query and key must have the same dtype, got q of ", dtype_text(q),
           " and ", names.k, " of ", dtype_text(k));
  AF_CHECK(v.dtype == q.dtype, "query and value must have the same dtype, got q of ", dtype_text(q),
           " and ", names.v, " of ", dtype_text(v));
  check_same_device(q, "q", k, names.k);
  check_same_device(q, "q", v, names.v);

  const bool packed_keys = call.packed() && !call.paged();
  const int64_t rank = packed_keys ? 3 : 4;
  const char* shape = packed_keys    ? "(total_k, num_heads_k, head_size)"
                      : call.paged() ? "(num_blocks, page_block_size, num_heads_k, head_size)"
                                     : "(batch_size, seqlen_k, num_heads_k, head_size)";
  const char* leading = packed_keys    ? "total_k"
                        : call.paged() ? "num_blocks, page_size"
                                       : "batch, seqlen_k";
  const int64_t head_dim = q.sizes[q.rank - 1];
  const bool batch_fits =
      packed_keys || call.paged() ||
      (k.rank == 4 && (k.sizes[0] == q.sizes[0] || (names.spare_rows && k.sizes[0] > q.sizes[0])));
  AF_CHECK(k.rank == rank && k.sizes[rank - 1] == head_dim && batch_fits, names.k,
           " must have shape ", shape, "; ", names.k, ": expected (", leading, ", heads_k, ",
           head_dim, "), got ", shape_text(k), " with q ", shape_text(q));
  bool v_fits = v.rank == rank;
  for (int64_t i = 0; v_fits && i + 1 < rank; ++i) v_fits = v.sizes[i] == k.sizes[i];
  AF_CHECK(v_fits, names.v, " must have shape ", shape, "; ", names.v, ": expected the shape of ",
           names.k, ", ", shape_text(k), ", up to the last dimension, got ", shape_text(v));
  check_last_dim_contiguous(q, "q");
  check_last_dim_contiguous(k, names.k);
  check_last_dim_contiguous(v, names.v);
  check_heads(q.sizes[q.rank - 2], k.sizes[rank - 2], names.k);
}

void check_sequences(const AttentionCall& call) {
  AF_CHECK(call.packed() || !call.cu_seqlens_k.given(),
           "cu_seqlens_q: missing, cu_seqlens_k is given");
  if (call.packed()) {
    AF_CHECK(call.cu_seqlens_q.rank == 1 && call.cu_seqlens_q.size(0) > 0,
             "cu_seqlens_q must have shape (batch_size + 1), got ", shape_text(call.cu_seqlens_q));
  }
  const int64_t batch = call.batch();
  if (call.packed()) {
    check_index_vector(call.cu_seqlens_q, "cu_seqlens_q", call.q, batch + 1, "(batch_size + 1)");
    AF_CHECK(call.options.max_seqlen_q >= 0, "max_seqlen_q: expected 0 or more, got ",
             call.options.max_seqlen_q);
    if (!call.paged()) {
      AF_CHECK(call.cu_seqlens_k.given(), "cu_seqlens_k: missing, cu_seqlens_q is given");
      AF_CHECK(call.options.max_seqlen_k >= 0, "max_seqlen_k: expected 0 or more, got ",
               call.options.max_seqlen_k);
    }
  }
  if (call.cu_seqlens_k.given()) {
    check_index_vector(call.cu_seqlens_k, "cu_seqlens_k", call.q, batch + 1, "(batch_size + 1)");
  }
  if (call.seqused_k.given()) {
    check_index_vector(call.seqused_k, "seqused_k", call.q, batch, "(batch_size)");
  }
  if (call.leftpad_k.given()) {
    AF_CHECK(!call.paged(), "We don't support Paged KV and leftpad_k running at the same time yet");
    check_index_vector(call.leftpad_k, "leftpad_k", call.q, batch, "(batch_size)");
  }
  if (call.paged()) check_block_table(call.block_table, call.q, batch);
}

void check_bias(const AttentionCall& call) {
  const TensorView& bias = call.bias;
  const ElementType dtype = bias.dtype;
  AF_CHECK(is_floating(dtype) || dtype == ElementType::boolean,
           "bias: expected a floating or bool dtype, got ", dtype_text(bias));
  check_same_device(call.q, "q", bias, "bias");
  const std::array<int64_t, 4> full{call.batch(), call.heads(), call.options.max_seqlen_q,
                                    call.options.max_seqlen_k};
  const int64_t rank = bias.rank;
  bool fits = rank <= 4;
  for (int64_t i = 0; fits && i < rank; ++i) {
    const int64_t size = bias.size(i), want = full[4 - rank + i];
    fits = size == want || size == 1;
  }
  AF_CHECK(fits, "bias: expected a shape that broadcasts to (batch, heads, seqlen_q, seqlen_k) = (",
           full[0], ", ", full[1], ", ", full[2], ", ", full[3], "), got ", shape_text(bias));
  check_allocated(bias, "bias");
}

void check_dropout(const AttentionCall& call) {
  AF_CHECK(call.options.dropout_p >= 0.0 && call.options.dropout_p < 1.0,
           "dropout_p: expected 0 <= dropout_p < 1, got ", call.options.dropout_p);
  if (call.options.dropout_p == 0.0) return;
  AF_CHECK(call.options.softcap == 0.0,
           "Softcapping does not support dropout for now, got softcap ", call.options.softcap,
           " and dropout_p ", call.options.dropout_p);
  AF_CHECK(call.rng_state.given(), "rng_state: missing, dropout_p is ", call.options.dropout_p);
  const TensorView& rng = call.rng_state;
  AF_CHECK(rng.dtype == ElementType::int64 && has_shape(rng, {2}) && rng.stride(0) == 1,
           "rng_state: expected a contiguous int64 tensor of shape (2,), got ", dtype_text(rng),
           " ", shape_text(rng));
  check_same_device(call.q, "q", rng, "rng_state");
  check_allocated(rng, "rng_state");
}

// Keys of sequence b that lie at rows begin[b] <= row < begin[b] + used[b], with gaps between
// sequences; what begin[batch] says does not count.
void check_used_rows(const Integers& begin, const Integers& used, const AttentionCall& call,
                     bool share) {
  const int64_t batch = call.batch(), total = call.k.size(0);
  for (int64_t b = 0; b < batch; ++b) {
    AF_CHECK(begin[b] >= 0 && begin[b] <= total, "cu_seqlens_k: expected 0 to ", total,
             ", the rows of k, got ", begin[b], " for sequence ", b);
    AF_CHECK(used[b] >= 0 && begin[b] + used[b] <= total, "seqused_k: expected 0 to ",
             total - begin[b], ", the rows of k from ", begin[b], " on, got ", used[b],
             " for sequence ", b);
    AF_CHECK(used[b] <= call.options.max_seqlen_k, "max_seqlen_k: expected at least ", used[b],
             ", the keys of sequence ", b, " in seqused_k, got ", call.options.max_seqlen_k);
    AF_CHECK(share || b + 1 == batch || begin[b] + used[b] <= begin[b + 1],
             "cu_seqlens_k: the backward needs sequences in the order of their rows, each with "
             "rows of its own, got sequence ",
             b, " at rows ", begin[b], " to ", begin[b] + used[b], " and sequence ", b + 1,
             " from ", begin[b + 1], " on");
  }
}

void check_values(const AttentionCall& call, bool is_backward) {
  const int64_t batch = call.batch();
  std::optional<Integers> cu_k, used, table;
  if (call.cu_seqlens_k.given() && !(call.paged() && call.seqused_k.given()))
    cu_k.emplace(call.cu_seqlens_k);
  if (call.seqused_k.given()) used.emplace(call.seqused_k);
  if (call.leftpad_k.given()) check_not_negative(Integers(call.leftpad_k), "leftpad_k");
  if (call.paged()) table.emplace(call.block_table);
  if (call.packed()) {
    check_cumulative(Integers(call.cu_seqlens_q), "cu_seqlens_q", &call.q, "q",
                     call.options.max_seqlen_q, "max_seqlen_q");
  }
  if (cu_k && used) {
    check_used_rows(*cu_k, *used, call, !is_backward);
  } else if (cu_k) {
    check_cumulative(*cu_k, "cu_seqlens_k", call.paged() ? nullptr : &call.k, "k",
                     call.options.max_seqlen_k,
                     call.paged() ? "block_table: capacity" : "max_seqlen_k");
  }
  for (int64_t b = 0; b < batch; ++b) {
    int64_t length = cu_k ? (*cu_k)[b + 1] - (*cu_k)[b] : call.options.max_seqlen_k;
    if (used) {
      length = (*used)[b];
      AF_CHECK(cu_k || (length >= 0 && length <= call.options.max_seqlen_k),
               "seqused_k: expected 0 to ", call.options.max_seqlen_k, ", the keys of sequence ", b,
               ", got ", length);
    }
    if (table) check_block_table_row(*table, b, length, call.k.size(1), call.k.size(0));
  }
}

void check(const AttentionCall& call, bool is_backward) {
  const char* direction = is_backward ? "backward" : "forward";
  check_query_and_keys(call, KeyNames{"k", "v", false}, direction);
  check_sequences(call);
  check_window_and_scale(call.options);
  check_dropout(call);
  if (call.alibi_slopes.given()) {
    check_alibi_slopes(call.alibi_slopes, call.q, call.batch(), call.heads());
  }
  if (call.bias.given()) check_bias(call);
  if (call.sinks.given()) check_sinks(call.sinks, call.q, call.heads());
  if (are_readable({&call.cu_seqlens_q, &call.cu_seqlens_k, &call.seqused_k, &call.leftpad_k,
                    &call.block_table})) {
    check_values(call, is_backward);
  }
}

}  // namespace

void check_forward(const AttentionCall& call) { check(call, false); }

void check_backward(const AttentionCall& call, const BackwardCall& grad) {
  check(call, true);
  const TensorView &q = call.q, &out = grad.out, &dout = grad.dout, &lse = grad.lse;
  AF_CHECK(out.dtype == q.dtype, "query and out must have the same dtype, got q of ",
           dtype_text(call.q), " and out of ", dtype_text(grad.out));
  AF_CHECK(dout.dtype == q.dtype, "query and dout must have the same dtype, got q of ",
           dtype_text(call.q), " and dout of ", dtype_text(grad.dout));
  check_same_device(call.q, "q", grad.dout, "dout");
  check_same_device(call.q, "q", grad.out, "out");
  check_same_device(call.q, "q", grad.lse, "softmax_lse");

  const int64_t* size = q.sizes;
  const int64_t heads = call.heads(), head_dim_v = call.head_dim_v();
  const bool packed = call.packed();
  const auto like_out = [&](const TensorView& x) {
    return packed ? has_shape(x, {size[0], heads, head_dim_v})
                  : has_shape(x, {size[0], size[1], heads, head_dim_v});
  };
  const auto like_lse = [&](const TensorView& x) {
    return packed ? has_shape(x, {heads, size[0]}) : has_shape(x, {size[0], heads, size[1]});
  };
  const char* out_names =
      packed ? "(total_q, num_heads, head_size)" : "(batch_size, seqlen_q, num_heads, head_size)";
  AF_CHECK(like_out(out), "out must have shape ", out_names, "; out: expected q's shape ",
           shape_text(call.q), " with last dimension ", head_dim_v, ", got ", shape_text(grad.out));
  AF_CHECK(like_out(dout), "dout must have shape ", out_names, "; dout: expected ",
           shape_text(grad.out), ", got ", shape_text(grad.dout));

  const ElementType lse_dtype =
      q.dtype == ElementType::fp64 ? ElementType::fp64 : ElementType::fp32;
  const char* lse_names = packed ? "(heads, total_q)" : "(batch, heads, seqlen_q)";
  AF_CHECK(lse.dtype == lse_dtype, "softmax_lse: expected ", dtype_name(lse_dtype), " for q of ",
           dtype_text(call.q), ", got ", dtype_text(grad.lse));
  AF_CHECK(like_lse(lse), "softmax_lse: expected ", lse_names, " for q ", shape_text(call.q),
           ", got ", shape_text(grad.lse));
  if (grad.dlse.given()) {
    AF_CHECK(like_lse(grad.dlse), "dsoftmax_lse: expected ", shape_text(grad.lse), ", got ",
             shape_text(grad.dlse));
    check_same_device(call.q, "q", grad.dlse, "dsoftmax_lse");
    check_allocated(grad.dlse, "dsoftmax_lse");
  }
  check_allocated(dout, "dout");
  check_allocated(out, "out");
  check_allocated(lse, "softmax_lse");
  AF_CHECK(!grad.bias_requires_grad || call.bias.given(), "bias_requires_grad: no bias is given");
  AF_CHECK(!grad.sinks_requires_grad || call.sinks.given(),
           "sinks_requires_grad: no sinks are given");
}

void check_query_and_keys(const AttentionCall& call, const KeyNames& names, const char* direction) {
  check_query(call);
  check_keys(call, names);
  check_head_dim("q", call.head_dim(), direction);
  check_head_dim(names.v, call.head_dim_v(), direction);
  check_allocated(call.q, "q");
  check_allocated(call.k, names.k);
  check_allocated(call.v, names.v);
}

void check_window_and_scale(const AttentionOptions& options) {
  AF_CHECK(std::isfinite(options.softmax_scale), "softmax_scale: expected a finite number, got ",
           options.softmax_scale);
  AF_CHECK(std::isfinite(options.softcap) && options.softcap >= 0.0,
           "softcap: expected a finite number of 0 or more, got ", options.softcap);
}

void check_alibi_slopes(const TensorView& slopes, const TensorView& q, int64_t batch,
                        int64_t heads) {
  AF_CHECK(slopes.dtype == ElementType::fp32,
           "ALiBi slopes must have dtype fp32, got alibi_slopes of ", dtype_text(slopes));
  check_same_device(q, "q", slopes, "alibi_slopes");
  AF_CHECK(has_shape(slopes, {heads}) || has_shape(slopes, {batch, heads}),
           "alibi_slopes: expected (heads,) or (batch, heads) = (", batch, ", ", heads, "), got ",
           shape_text(slopes));
  AF_CHECK(slopes.stride(-1) == 1 || heads <= 1,
           "ALiBi slopes tensor must have contiguous last dimension, got alibi_slopes with stride ",
           slopes.stride(-1));
  check_allocated(slopes, "alibi_slopes");
}

void check_sinks(const TensorView& sinks, const TensorView& q, int64_t heads) {
  AF_CHECK(is_floating(sinks.dtype), "sinks: expected a floating dtype, got ", dtype_text(sinks));
  check_same_device(q, "q", sinks, "sinks");
  AF_CHECK(has_shape(sinks, {heads}), "sinks: expected (heads,) = (", heads, ",), got ",
           shape_text(sinks));
  check_allocated(sinks, "sinks");
}

void check_block_table(const TensorView& table, const TensorView& q, int64_t batch) {
  AF_CHECK(table.dtype == ElementType::int32, "block_table must have dtype torch.int32, got ",
           dtype_text(table));
  check_same_device(q, "q", table, "block_table");
  AF_CHECK(table.rank == 2 && table.sizes[0] == batch,
           "block_table must have shape (batch_size, max_num_blocks_per_seq): expected (", batch,
           ", max_blocks), got ", shape_text(table));
  AF_CHECK(table.stride(1) == 1 || table.sizes[1] <= 1,
           "block_table must have contiguous last dimension, got stride ", table.stride(1));
  check_allocated(table, "block_table");
}

void check_block_table_row(const Integers& table, int64_t sequence, int64_t used, int64_t page_size,
                           int64_t num_blocks) {
  if (used <= 0) return;
  const int64_t pages = (used + page_size - 1) / page_size;
  for (int64_t i = 0; i < pages; ++i) {
    const int64_t page = table.at(sequence, i);
    AF_CHECK(page >= 0 && page < num_blocks, "block_table: expected pages 0 to ", num_blocks - 1,
             ", got ", page, " as page ", i, " of sequence ", sequence);
  }
}

bool are_readable(std::initializer_list<const TensorView*> tensors) {
  for (const TensorView* tensor : tensors) {
    if (tensor->given() && tensor->host == nullptr && tensor->numel() > 0) return false;
  }
  return true;
}

}  // namespace anyflash
