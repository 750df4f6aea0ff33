#include <optional>

#include "core/attention_checks.h"
#include "core/kvcache.h"

namespace anyflash {
namespace {

void check_new_keys(const KVCacheCall& call) {
  AF_CHECK(call.v.given(), "If key is supplied, value must also be passed in, got k without v");
  AF_CHECK(call.cache_seqlens.given(),
           "If key is supplied, seqlens_k must also be passed in, got k without cache_seqlens");
  const TensorView &k = call.k, &v = call.v;
  AF_CHECK(k.dtype == call.q.dtype, "key must have the same dtype as query, got k of ",
           dtype_text(k), " and q of ", dtype_text(call.q));
  AF_CHECK(v.dtype == call.q.dtype, "value must have the same dtype as query, got v of ",
           dtype_text(v), " and q of ", dtype_text(call.q));
  check_same_device(call.q, "q", k, "k");
  check_same_device(call.q, "q", v, "v");
  const int64_t heads_k = call.k_cache.size(2);
  const auto check_shape = [&](const TensorView& x, const char* name, int64_t seqlen,
                               int64_t head_dim) {
    const bool fits = x.rank == 4 && x.size(0) == call.batch() && x.size(2) == heads_k &&
                      x.size(3) == head_dim && (seqlen < 0 || x.size(1) == seqlen);
    AF_CHECK(fits, name, " must have shape (batch_size, seqlen_knew, num_heads_k, head_size); ",
             name, ": expected (", call.batch(), ", ", seqlen < 0 ? "seqlen_new" : text(seqlen),
             ", ", heads_k, ", ", head_dim, "), got ", shape_text(x));
  };
  check_shape(k, "k", -1, call.k_cache.size(3));
  check_shape(v, "v", k.size(1), call.v_cache.size(3));
  AF_CHECK(k.size(1) <= call.capacity(),
           "If key is supplied, it must have seqlen <= the seqlen of the KV cache, got ", k.size(1),
           " new keys for a cache of ", call.capacity());
  check_allocated(k, "k");
  check_allocated(v, "v");
}

void check_rotary(const KVCacheCall& call) {
  AF_CHECK(call.rotary_cos.given(), "If rotary sin is provided, rotary cos must also be provided");
  AF_CHECK(call.rotary_sin.given(), "If rotary cos is provided, rotary sin must also be provided");
  AF_CHECK(
      call.k.given(),
      "If rotary cos/sin are provided, new key / value to be appended to KV cache must also be "
      "provided");
  const TensorView &cos = call.rotary_cos, &sin = call.rotary_sin;
  AF_CHECK(cos.rank == 2, "rotary_cos: expected (seqlen_rotary, rotary_dim / 2), got ",
           shape_text(cos));
  AF_CHECK(sin.rank == 2 && sin.size(0) == cos.size(0) && sin.size(1) == cos.size(1),
           "rotary_sin: expected the shape of rotary_cos, ", shape_text(cos), ", got ",
           shape_text(sin));
  const int64_t rotary_dim = 2 * cos.size(1), head_dim = call.q.size(3);
  AF_CHECK(rotary_dim <= head_dim, "rotary_dim must be <= headdim, got rotary_dim ", rotary_dim,
           " and head_dim ", head_dim);
  AF_CHECK(cos.size(0) >= call.capacity(),
           "cos/sin seqlen must be at least the seqlen of KV cache, got ", cos.size(0),
           " rows for a cache of ", call.capacity());
  AF_CHECK(cos.dtype == call.q.dtype,
           "rotary_cos must have the same dtype as query, got rotary_cos of ", dtype_text(cos),
           " and q of ", dtype_text(call.q));
  AF_CHECK(sin.dtype == call.q.dtype,
           "rotary_sin must have the same dtype as query, got rotary_sin of ", dtype_text(sin),
           " and q of ", dtype_text(call.q));
  check_same_device(call.q, "q", cos, "rotary_cos");
  check_same_device(call.q, "q", sin, "rotary_sin");
  check_allocated(cos, "rotary_cos");
  check_allocated(sin, "rotary_sin");
}

// The append writes the caches while it reads everything else.
void check_writes(const KVCacheCall& call) {
  check_no_self_overlap(call.k_cache, "k_cache");
  check_no_self_overlap(call.v_cache, "v_cache");
  check_no_overlap(call.k_cache, "k_cache", call.v_cache, "v_cache");
  const auto check_apart = [&call](const TensorView& read, const char* name) {
    check_no_overlap(call.k_cache, "k_cache", read, name);
    check_no_overlap(call.v_cache, "v_cache", read, name);
  };
  check_apart(call.q, "q");
  check_apart(call.k, "k");
  check_apart(call.v, "v");
  check_apart(call.rotary_cos, "rotary_cos");
  check_apart(call.rotary_sin, "rotary_sin");
}

void check_lengths(const KVCacheCall& call) {
  const int64_t batch = call.batch();
  if (call.cache_seqlens.given()) {
    check_index_vector(call.cache_seqlens, "cache_seqlens", call.q, batch, "(batch_size)");
  }
  if (call.cache_leftpad.given()) {
    AF_CHECK(!call.block_table.given(),
             "We don't support Paged KV and leftpad_k running at the same time yet, got "
             "block_table and cache_leftpad");
    check_index_vector(call.cache_leftpad, "cache_leftpad", call.q, batch, "(batch_size)");
  }
  if (call.cache_batch_idx.given()) {
    AF_CHECK(!call.block_table.given(), "Paged KVcache does not support cache_batch_idx");
    check_index_vector(call.cache_batch_idx, "cache_batch_idx", call.q, batch, "(batch_size)");
  }
}

void check_values(const KVCacheCall& call) {
  const int64_t batch = call.batch(), capacity = call.capacity(), added = call.seqlen_new();
  std::optional<Integers> lengths, rows, table;
  if (call.cache_seqlens.given()) {
    check_not_negative(lengths.emplace(call.cache_seqlens), "cache_seqlens");
  }
  if (call.cache_batch_idx.given()) rows.emplace(call.cache_batch_idx);
  if (call.cache_leftpad.given()) {
    check_not_negative(Integers(call.cache_leftpad), "cache_leftpad");
  }
  if (call.block_table.given()) table.emplace(call.block_table);
  for (int64_t b = 0; b < batch; ++b) {
    int64_t used = capacity;
    if (lengths) {
      const int64_t length = (*lengths)[b];
      used = length + added;
      AF_CHECK(used <= capacity || !table, "Paged KV cache: max(seqlens_k) + seqlen_new = ", used,
               " exceeds the capacity addressable by block_table, ", capacity,
               " (cache_seqlens is ", length, " for sequence ", b, ")");
      AF_CHECK(used <= capacity, "cache_seqlens: expected at most ", capacity - added,
               " (k_cache holds ", capacity, ", k adds ", added, "), got ", length,
               " for sequence ", b);
    }
    if (rows) {
      AF_CHECK((*rows)[b] >= 0 && (*rows)[b] < call.k_cache.size(0),
               "cache_batch_idx: expected 0 to ", call.k_cache.size(0) - 1,
               ", the rows of k_cache, got ", (*rows)[b], " for sequence ", b);
    }
    if (table) check_block_table_row(*table, b, used, call.k_cache.size(1), call.k_cache.size(0));
  }
}

}  // namespace

void check_kvcache(const KVCacheCall& call) {
  // Shapes as the caller wrote them: cache_batch_idx picks rows from a cache of any size.
  AttentionCall attention;
  attention.q = call.q;
  attention.k = call.k_cache;
  attention.v = call.v_cache;
  attention.block_table = call.block_table.given() ? call.block_table : call.cache_batch_idx;
  check_query_and_keys(attention, KeyNames{"k_cache", "v_cache", true}, "forward");
  if (call.block_table.given()) check_block_table(call.block_table, call.q, call.batch());
  check_lengths(call);
  if (call.k.given()) check_new_keys(call);
  AF_CHECK(call.k.given() || !call.v.given(), "v: given without k");
  if (call.rotary_cos.given() || call.rotary_sin.given()) check_rotary(call);
  check_window_and_scale(call.options);
  const int64_t heads = call.q.size(2);
  if (call.alibi_slopes.given()) {
    check_alibi_slopes(call.alibi_slopes, call.q, call.batch(), heads);
  }
  if (call.sinks.given()) check_sinks(call.sinks, call.q, heads);
  if (are_readable(
          {&call.cache_seqlens, &call.cache_batch_idx, &call.cache_leftpad, &call.block_table})) {
    check_values(call);
  }
  if (call.appends()) check_writes(call);
}

}  // namespace anyflash
