#include "validate.h"

#include <array>
#include <cmath>

#include "environment.h"
#include "stable/check.h"
#include "stable/dtypes.h"

namespace anyflash {
namespace {

// What is read of one tensor, so that the common case asks libtorch once for each.
struct Facts {
  explicit Facts(const Tensor& tensor)
      : rank(tensor.dim()), sizes(tensor.sizes().data()), dtype(dtype_of(tensor)) {}
  int64_t rank;
  const int64_t* sizes;
  int32_t dtype;
};

void check_heads(int64_t heads, int64_t heads_k, const char* k_name) {
  AF_CHECK(heads > 0 && heads_k > 0 && heads % heads_k == 0,
           "Number of heads in key/value must divide number of heads in query, got ", heads_k,
           " heads in ", k_name, " and ", heads, " in q");
}

bool has_shape(const Facts& facts, std::initializer_list<int64_t> expected) {
  if (facts.rank != static_cast<int64_t>(expected.size())) return false;
  const int64_t* size = facts.sizes;
  for (const int64_t want : expected) {
    if (*size++ != want) return false;
  }
  return true;
}

void check_query(const AttentionArgs& args, const Facts& q) {
  // Ranks first: everything after counts dimensions.
  if (args.packed()) {
    AF_CHECK(q.rank == 3, "q: expected (total_q, heads, head_dim) with cu_seqlens_q, got ",
             shape_text(args.q));
  } else {
    AF_CHECK(q.rank == 4, "q: expected (batch, seqlen_q, heads, head_dim), got ",
             shape_text(args.q));
  }
  AF_CHECK(
      dtypes().is_floating(q.dtype),
      "FlashAttention only support fp16 and bf16 data type (anyflash: fp32 and fp64 too), got ",
      "q of ", dtype_text(args.q));
}

// k and v: dtype, device, layout and shape, which a message writes down as the original library
// does.
void check_keys(const AttentionArgs& args, const KeyNames& names, const Facts& q, const Facts& k,
                const Facts& v) {
  AF_CHECK(k.dtype == q.dtype, "query and key must have the same dtype, got q of ",
           dtype_text(args.q), " and ", names.k, " of ", dtype_text(args.k));
  AF_CHECK(v.dtype == q.dtype, "query and value must have the same dtype, got q of ",
           dtype_text(args.q), " and ", names.v, " of ", dtype_text(args.v));
  check_same_device(args.q, "q", args.k, names.k);
  check_same_device(args.q, "q", args.v, names.v);

  const bool packed_keys = args.packed() && !args.paged();
  const int64_t rank = packed_keys ? 3 : 4;
  const char* shape = packed_keys    ? "(total_k, num_heads_k, head_size)"
                      : args.paged() ? "(num_blocks, page_block_size, num_heads_k, head_size)"
                                     : "(batch_size, seqlen_k, num_heads_k, head_size)";
  const char* leading = packed_keys    ? "total_k"
                        : args.paged() ? "num_blocks, page_size"
                                       : "batch, seqlen_k";
  const int64_t head_dim = q.sizes[q.rank - 1];
  const bool batch_fits =
      packed_keys || args.paged() ||
      (k.rank == 4 && (k.sizes[0] == q.sizes[0] || (names.spare_rows && k.sizes[0] > q.sizes[0])));
  AF_CHECK(k.rank == rank && k.sizes[rank - 1] == head_dim && batch_fits, names.k,
           " must have shape ", shape, "; ", names.k, ": expected (", leading, ", heads_k, ",
           head_dim, "), got ", shape_text(args.k), " with q ", shape_text(args.q));
  bool v_fits = v.rank == rank;
  for (int64_t i = 0; v_fits && i + 1 < rank; ++i) v_fits = v.sizes[i] == k.sizes[i];
  AF_CHECK(v_fits, names.v, " must have shape ", shape, "; ", names.v, ": expected the shape of ",
           names.k, ", ", shape_text(args.k), ", up to the last dimension, got ",
           shape_text(args.v));
  check_last_dim_contiguous(args.q, "q");
  check_last_dim_contiguous(args.k, names.k);
  check_last_dim_contiguous(args.v, names.v);
  check_heads(q.sizes[q.rank - 2], k.sizes[rank - 2], names.k);
}

void check_sequences(const AttentionArgs& args) {
  AF_CHECK(args.packed() || !args.cu_seqlens_k, "cu_seqlens_q: missing, cu_seqlens_k is given");
  if (args.packed()) {
    AF_CHECK(args.cu_seqlens_q->dim() == 1 && args.cu_seqlens_q->size(0) > 0,
             "cu_seqlens_q must have shape (batch_size + 1), got ", shape_text(*args.cu_seqlens_q));
  }
  const int64_t batch = args.batch();
  if (args.packed()) {
    check_index_vector(*args.cu_seqlens_q, "cu_seqlens_q", args.q, batch + 1, "(batch_size + 1)");
    AF_CHECK(args.max_seqlen_q >= 0, "max_seqlen_q: expected 0 or more, got ", args.max_seqlen_q);
    if (!args.paged()) {
      AF_CHECK(args.cu_seqlens_k, "cu_seqlens_k: missing, cu_seqlens_q is given");
      AF_CHECK(args.max_seqlen_k >= 0, "max_seqlen_k: expected 0 or more, got ", args.max_seqlen_k);
    }
  }
  if (args.cu_seqlens_k) {
    check_index_vector(*args.cu_seqlens_k, "cu_seqlens_k", args.q, batch + 1, "(batch_size + 1)");
  }
  if (args.seqused_k) {
    check_index_vector(*args.seqused_k, "seqused_k", args.q, batch, "(batch_size)");
  }
  if (args.leftpad_k) {
    AF_CHECK(!args.paged(), "We don't support Paged KV and leftpad_k running at the same time yet");
    check_index_vector(*args.leftpad_k, "leftpad_k", args.q, batch, "(batch_size)");
  }
  if (args.paged()) check_block_table(*args.block_table, args.q, batch);
}

void check_bias(const AttentionArgs& args) {
  const Tensor& bias = *args.bias;
  const int32_t dtype = dtype_of(bias);
  AF_CHECK(dtypes().is_floating(dtype) || dtype == dtypes().boolean,
           "bias: expected a floating or bool dtype, got ", dtype_text(bias));
  check_same_device(args.q, "q", bias, "bias");
  const std::array<int64_t, 4> full{args.batch(), args.heads(), args.max_seqlen_q,
                                    args.max_seqlen_k};
  const int64_t rank = bias.dim();
  bool fits = rank <= 4;
  for (int64_t i = 0; fits && i < rank; ++i) {
    const int64_t size = bias.size(i), want = full[4 - rank + i];
    fits = size == want || size == 1;
  }
  AF_CHECK(fits, "bias: expected a shape that broadcasts to (batch, heads, seqlen_q, seqlen_k) = (",
           full[0], ", ", full[1], ", ", full[2], ", ", full[3], "), got ", shape_text(bias));
}

void check_dropout(const AttentionArgs& args) {
  AF_CHECK(args.dropout_p >= 0.0 && args.dropout_p < 1.0,
           "dropout_p: expected 0 <= dropout_p < 1, got ", args.dropout_p);
  if (args.dropout_p == 0.0) return;
  AF_CHECK(args.softcap == 0.0, "Softcapping does not support dropout for now, got softcap ",
           args.softcap, " and dropout_p ", args.dropout_p);
  AF_CHECK(args.rng_state, "rng_state: missing, dropout_p is ", args.dropout_p);
  const Tensor& rng = *args.rng_state;
  AF_CHECK(dtype_of(rng) == dtypes().int64 && has_shape(Facts(rng), {2}) && rng.is_contiguous(),
           "rng_state: expected a contiguous int64 tensor of shape (2,), got ", dtype_text(rng),
           " ", shape_text(rng));
  check_same_device(args.q, "q", rng, "rng_state");
}

// What nothing but `longest_name` and, where its rows follow each other, `storage` bounds.
void check_cumulative(const HostInts& cu, const char* name, int64_t batch, const Tensor* storage,
                      const char* storage_name, int64_t longest, const char* longest_name) {
  AF_CHECK(cu[0] == 0, name, ": expected to start at 0, got ", cu[0]);
  for (int64_t i = 0; i < batch; ++i) {
    AF_CHECK(cu[i + 1] >= cu[i], name, ": must not decrease, got ", cu[i], " and then ", cu[i + 1],
             " at index ", i + 1);
    AF_CHECK(cu[i + 1] - cu[i] <= longest, longest_name, ": expected at least ", cu[i + 1] - cu[i],
             ", the length of sequence ", i, " in ", name, ", got ", longest);
  }
  if (storage != nullptr) {
    AF_CHECK(cu[batch] <= storage->size(0), name, ": ends at ", cu[batch], ", but ", storage_name,
             " has ", storage->size(0), " rows");
  }
}

// Keys of sequence b that lie at rows begin[b] <= row < begin[b] + used[b], with gaps between
// sequences; what begin[batch] says does not count.
void check_used_rows(const HostInts& begin, const HostInts& used, const AttentionArgs& args,
                     bool share) {
  const int64_t batch = args.batch(), total = args.k.size(0);
  for (int64_t b = 0; b < batch; ++b) {
    AF_CHECK(begin[b] >= 0 && begin[b] <= total, "cu_seqlens_k: expected 0 to ", total,
             ", the rows of k, got ", begin[b], " for sequence ", b);
    AF_CHECK(used[b] >= 0 && begin[b] + used[b] <= total, "seqused_k: expected 0 to ",
             total - begin[b], ", the rows of k from ", begin[b], " on, got ", used[b],
             " for sequence ", b);
    AF_CHECK(used[b] <= args.max_seqlen_k, "max_seqlen_k: expected at least ", used[b],
             ", the keys of sequence ", b, " in seqused_k, got ", args.max_seqlen_k);
    AF_CHECK(share || b + 1 == batch || begin[b] + used[b] <= begin[b + 1],
             "cu_seqlens_k: the backward needs sequences in the order of their rows, each with "
             "rows of its own, got sequence ",
             b, " at rows ", begin[b], " to ", begin[b] + used[b], " and sequence ", b + 1,
             " from ", begin[b + 1], " on");
  }
}

void check_values(const AttentionArgs& args, bool is_backward) {
  const int64_t batch = args.batch();
  std::optional<HostInts> cu_k, used, leftpad, table;
  if (args.cu_seqlens_k && !(args.paged() && args.seqused_k)) cu_k.emplace(*args.cu_seqlens_k);
  if (args.seqused_k) used.emplace(*args.seqused_k);
  if (args.leftpad_k) leftpad.emplace(*args.leftpad_k);
  if (args.paged()) table.emplace(*args.block_table);
  if (args.packed()) {
    check_cumulative(HostInts(*args.cu_seqlens_q), "cu_seqlens_q", batch, &args.q, "q",
                     args.max_seqlen_q, "max_seqlen_q");
  }
  if (cu_k && used) {
    check_used_rows(*cu_k, *used, args, !is_backward);
  } else if (cu_k) {
    check_cumulative(*cu_k, "cu_seqlens_k", batch, args.paged() ? nullptr : &args.k, "k",
                     args.max_seqlen_k, args.paged() ? "block_table: capacity" : "max_seqlen_k");
  }
  for (int64_t b = 0; b < batch; ++b) {
    int64_t length = cu_k ? (*cu_k)[b + 1] - (*cu_k)[b] : args.max_seqlen_k;
    if (used) {
      length = (*used)[b];
      AF_CHECK(cu_k || (length >= 0 && length <= args.max_seqlen_k), "seqused_k: expected 0 to ",
               args.max_seqlen_k, ", the keys of sequence ", b, ", got ", length);
    }
    if (leftpad) {
      AF_CHECK((*leftpad)[b] >= 0, "leftpad_k: expected 0 or more, got ", (*leftpad)[b],
               " for sequence ", b);
    }
    if (table) check_block_table_row(*table, b, length, args.k.size(1), args.k.size(0));
  }
}

void check(const AttentionArgs& args, bool is_backward) {
  const char* direction = is_backward ? "backward" : "forward";
  check_query_and_keys(args, KeyNames{"k", "v", false}, direction);
  check_sequences(args);
  check_window_and_scale(args.softmax_scale, args.softcap);
  check_dropout(args);
  if (args.alibi_slopes) {
    check_alibi_slopes(*args.alibi_slopes, args.q, args.batch(), args.heads());
  }
  if (args.bias) check_bias(args);
  if (args.sinks) check_sinks(*args.sinks, args.q, args.heads());
  const bool has_values = args.packed() || args.seqused_k || args.leftpad_k || args.paged();
  if (has_values && values_are_checked(args.q)) check_values(args, is_backward);
}

}  // namespace

void validate_forward(const AttentionArgs& args) { check(args, false); }

void validate_backward(const AttentionArgs& args, const BackwardArgs& grad) {
  check(args, true);
  const Facts q(args.q), out(grad.out), dout(grad.dout), lse(grad.lse);
  AF_CHECK(out.dtype == q.dtype, "query and out must have the same dtype, got q of ",
           dtype_text(args.q), " and out of ", dtype_text(grad.out));
  AF_CHECK(dout.dtype == q.dtype, "query and dout must have the same dtype, got q of ",
           dtype_text(args.q), " and dout of ", dtype_text(grad.dout));
  check_same_device(args.q, "q", grad.dout, "dout");
  check_same_device(args.q, "q", grad.out, "out");
  check_same_device(args.q, "q", grad.lse, "lse");

  const int64_t* size = q.sizes;
  const int64_t heads = args.heads(), head_dim_v = args.head_dim_v();
  const bool packed = args.packed();
  const auto like_out = [&](const Facts& facts) {
    return packed ? has_shape(facts, {size[0], heads, head_dim_v})
                  : has_shape(facts, {size[0], size[1], heads, head_dim_v});
  };
  const auto like_lse = [&](const Facts& facts) {
    return packed ? has_shape(facts, {heads, size[0]})
                  : has_shape(facts, {size[0], heads, size[1]});
  };
  const char* out_names =
      packed ? "(total_q, num_heads, head_size)" : "(batch_size, seqlen_q, num_heads, head_size)";
  AF_CHECK(like_out(out), "out must have shape ", out_names, "; out: expected q's shape ",
           shape_text(args.q), " with last dimension ", head_dim_v, ", got ", shape_text(grad.out));
  AF_CHECK(like_out(dout), "dout must have shape ", out_names, "; dout: expected ",
           shape_text(grad.out), ", got ", shape_text(grad.dout));

  const int32_t lse_dtype = q.dtype == dtypes().fp64 ? dtypes().fp64 : dtypes().fp32;
  const char* lse_names = packed ? "(heads, total_q)" : "(batch, heads, seqlen_q)";
  AF_CHECK(lse.dtype == lse_dtype, "lse: expected ", lse_dtype == dtypes().fp64 ? "fp64" : "fp32",
           " for q of ", dtype_text(args.q), ", got ", dtype_text(grad.lse));
  AF_CHECK(like_lse(lse), "lse: expected ", lse_names, " for q ", shape_text(args.q), ", got ",
           shape_text(grad.lse));
  if (grad.dlse) {
    AF_CHECK(like_lse(Facts(*grad.dlse)), "dlse: expected ", shape_text(grad.lse), ", got ",
             shape_text(*grad.dlse));
    check_same_device(args.q, "q", *grad.dlse, "dlse");
  }
  AF_CHECK(!grad.bias_requires_grad || args.bias, "bias_requires_grad: no bias is given");
  AF_CHECK(!grad.sinks_requires_grad || args.sinks, "sinks_requires_grad: no sinks are given");
}

void check_query_and_keys(const AttentionArgs& args, const KeyNames& names, const char* direction) {
  const Facts q(args.q), k(args.k), v(args.v);
  check_query(args, q);
  check_keys(args, names, q, k, v);
  check_head_dim("q", q.sizes[q.rank - 1], direction);
  check_head_dim(names.v, v.sizes[v.rank - 1], direction);
}

void check_head_dim(const char* name, int64_t head_dim, const char* direction) {
  AF_CHECK(head_dim <= kMaxHeadDim, "FlashAttention ", direction,
           " only supports head dimension at most 256 (anyflash: ", kMaxHeadDim, "), got ", name,
           " with head_dim ", head_dim);
  AF_CHECK(head_dim > 0, name, ": expected a head_dim of 1 to ", kMaxHeadDim, ", got ", head_dim);
}

void check_window_and_scale(double softmax_scale, double softcap) {
  AF_CHECK(std::isfinite(softmax_scale), "softmax_scale: expected a finite number, got ",
           softmax_scale);
  AF_CHECK(std::isfinite(softcap) && softcap >= 0.0,
           "softcap: expected a finite number of 0 or more, got ", softcap);
}

void check_same_device(const Tensor& reference, const char* reference_name, const Tensor& tensor,
                       const char* name) {
  int32_t type[2] = {}, index[2] = {};
  check_code(aoti_torch_get_device_type(reference.get(), &type[0]), "device type");
  check_code(aoti_torch_get_device_type(tensor.get(), &type[1]), "device type");
  check_code(aoti_torch_get_device_index(reference.get(), &index[0]), "device index");
  check_code(aoti_torch_get_device_index(tensor.get(), &index[1]), "device index");
  AF_CHECK(type[0] == type[1] && index[0] == index[1], name, " must be on ",
           reference.is_cuda() ? "CUDA" : "cpu", ": expected ", device_text(reference), " like ",
           reference_name, ", got ", device_text(tensor));
}

void check_last_dim_contiguous(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  AF_CHECK(tensor.stride(last) == 1 || tensor.size(last) <= 1,
           "Input tensor must have contiguous last dimension, got ", name, " with stride ",
           tensor.stride(last));
}

void check_alibi_slopes(const Tensor& slopes, const Tensor& q, int64_t batch, int64_t heads) {
  const Facts facts(slopes);
  AF_CHECK(facts.dtype == dtypes().fp32, "ALiBi slopes must have dtype fp32, got alibi_slopes of ",
           dtype_text(slopes));
  check_same_device(q, "q", slopes, "alibi_slopes");
  AF_CHECK(has_shape(facts, {heads}) || has_shape(facts, {batch, heads}),
           "alibi_slopes: expected (heads,) or (batch, heads) = (", batch, ", ", heads, "), got ",
           shape_text(slopes));
  AF_CHECK(slopes.stride(facts.rank - 1) == 1 || heads <= 1,
           "ALiBi slopes tensor must have contiguous last dimension, got alibi_slopes with stride ",
           slopes.stride(facts.rank - 1));
}

void check_sinks(const Tensor& sinks, const Tensor& q, int64_t heads) {
  const Facts facts(sinks);
  AF_CHECK(dtypes().is_floating(facts.dtype), "sinks: expected a floating dtype, got ",
           dtype_text(sinks));
  check_same_device(q, "q", sinks, "sinks");
  AF_CHECK(has_shape(facts, {heads}), "sinks: expected (heads,) = (", heads, ",), got ",
           shape_text(sinks));
}

void check_index_vector(const Tensor& tensor, const char* name, const Tensor& q, int64_t size,
                        const char* size_text) {
  const Facts facts(tensor);
  AF_CHECK(facts.dtype == dtypes().int32, name, " must have dtype int32, got ", dtype_text(tensor));
  check_same_device(q, "q", tensor, name);
  AF_CHECK(tensor.is_contiguous(), name, " must be contiguous, got shape ", shape_text(tensor),
           " with stride ", facts.rank > 0 ? tensor.stride(facts.rank - 1) : 0);
  AF_CHECK(has_shape(facts, {size}), name, " must have shape ", size_text, ": expected (", size,
           ",), got ", shape_text(tensor));
}

void check_block_table(const Tensor& table, const Tensor& q, int64_t batch) {
  const Facts facts(table);
  AF_CHECK(facts.dtype == dtypes().int32, "block_table must have dtype torch.int32, got ",
           dtype_text(table));
  check_same_device(q, "q", table, "block_table");
  AF_CHECK(facts.rank == 2 && facts.sizes[0] == batch,
           "block_table must have shape (batch_size, max_num_blocks_per_seq): expected (", batch,
           ", max_blocks), got ", shape_text(table));
  AF_CHECK(table.stride(1) == 1 || facts.sizes[1] <= 1,
           "block_table must have contiguous last dimension, got stride ", table.stride(1));
}

void check_block_table_row(const HostInts& table, int64_t sequence, int64_t used, int64_t page_size,
                           int64_t num_blocks) {
  if (used <= 0) return;
  const int64_t pages = (used + page_size - 1) / page_size;
  for (int64_t i = 0; i < pages; ++i) {
    const int64_t page = table.at(sequence, i);
    AF_CHECK(page >= 0 && page < num_blocks, "block_table: expected pages 0 to ", num_blocks - 1,
             ", got ", page, " as page ", i, " of sequence ", sequence);
  }
}

bool values_are_checked(const Tensor& q) { return q.is_cpu() || environment().check_values; }

HostInts::HostInts(const Tensor& tensor) : tensor_(tensor) {
  if (!tensor.is_cpu()) {
    const int64_t rank = tensor.dim();
    const std::array<int64_t, 2> sizes{tensor.size(0), rank == 2 ? tensor.size(1) : 1};
    const std::array<int64_t, 2> strides{sizes[1], 1};
    AtenTensorHandle copy = nullptr;
    check_code(aoti_torch_empty_strided(rank, sizes.data(), strides.data(), dtypes().int32,
                                        aoti_torch_device_type_cpu(), -1, &copy),
               "empty_strided");
    tensor_ = Tensor(copy);
    check_code(aoti_torch_copy_(copy, tensor.get(), 0), "copy_");
  }
  data_ = static_cast<const int32_t*>(tensor_.const_data_ptr());
  if (tensor_.dim() == 2) row_stride_ = tensor_.stride(0);
}

}  // namespace anyflash
