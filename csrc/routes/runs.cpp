#include "routes/runs.h"

#include <limits>

#include "kernels/lengths.h"

namespace anyflash {

namespace {

// A contiguous int32 tensor on the CPU, read in place.
const int32_t* host_ints(const OptionalTensor& x) {
  return x ? static_cast<const int32_t*>(x->const_data_ptr()) : nullptr;
}

// The span of `count + 1` sequences, if the next one continues it.
bool continues(const Span& span, int64_t count, const Span& next, bool packed) {
  if (next.length != span.length) return false;
  if (!packed) return next.begin == span.begin;
  return count == 1 || next.begin == span.begin + count * span.step;
}

Tensor packed_rows(const Span& span, int64_t count, const Tensor& x) {
  const int64_t row = x.stride(0);
  return view(x, {count, span.length, x.size(1), x.size(2)},
              {span.step * row, row, x.stride(1), x.stride(2)}, span.begin * row);
}

Tensor dense_rows(const Span& span, const Run& run, const Tensor& x) {
  if (run.count == x.size(0) && span.length == x.size(1)) return x;
  return narrow(narrow(x, 0, run.sequence, run.count), 1, span.begin, span.length);
}

Tensor gather_pages(const AttentionArgs& args, const Run& run, const Tensor& x) {
  const int64_t page = std::max<int64_t>(x.size(1), 1);  // of empty pages there are none to gather
  const int64_t pages = (run.k.begin + run.k.length + page - 1) / page;
  const Tensor table = narrow(select(*args.block_table, 0, run.sequence), 0, 0, pages);
  const Tensor gathered =
      aten<Tensor>("aten::index_select", "", x, 0, table);  // (pages, page, heads_k, n), contiguous
  const Sizes sizes = gathered.sizes();
  const int64_t row = sizes[2] * sizes[3];
  return view(gathered, {1, run.k.length, sizes[2], sizes[3]},
              {pages * page * row, row, sizes[3], 1}, run.k.begin * row);
}

}  // namespace

std::vector<Run> split_runs(const AttentionArgs& args) {
  const int64_t batch = args.batch();
  const int32_t* starts_q = host_ints(args.cu_seqlens_q);
  const KeyLengths lengths{host_ints(args.cu_seqlens_k), host_ints(args.seqused_k),
                           host_ints(args.leftpad_k), args.paged(), args.max_seqlen_k};
  const bool packed_k = args.packed() && !args.paged();
  if (!args.packed() && !args.seqused_k && !args.leftpad_k && !args.paged()) {
    if (batch == 0 || args.max_seqlen_q == 0) return {};
    return {{0, batch, {0, 0, args.max_seqlen_q}, {0, 0, args.max_seqlen_k}}};
  }
  std::vector<Run> runs;
  for (int64_t n = 0; n < batch; ++n) {
    Run next{n, 1, {0, 0, args.max_seqlen_q}, {0, 0, args.max_seqlen_k}};
    if (starts_q) next.q = {starts_q[n], 0, starts_q[n + 1] - starts_q[n]};
    const KeySpan<int64_t> keys = lengths.visible(n);
    next.k = {keys.first, 0, keys.length};
    if (next.q.length <= 0) continue;
    Run* last = runs.empty() ? nullptr : &runs.back();
    const bool joins = last != nullptr && !args.paged() && last->sequence + last->count == n &&
                       continues(last->q, last->count, next.q, args.packed()) &&
                       continues(last->k, last->count, next.k, packed_k);
    if (!joins) {
      runs.push_back(next);
      continue;
    }
    if (last->count == 1) {
      last->q.step = next.q.begin - last->q.begin;
      last->k.step = next.k.begin - last->k.begin;
    }
    ++last->count;
  }
  return runs;
}

Tensor query_rows(const AttentionArgs& args, const Run& run, const Tensor& x) {
  return args.packed() ? packed_rows(run.q, run.count, x) : dense_rows(run.q, run, x);
}

Tensor key_rows(const AttentionArgs& args, const Run& run, const Tensor& x) {
  if (args.paged()) return gather_pages(args, run, x);
  return args.packed() ? packed_rows(run.k, run.count, x) : dense_rows(run.k, run, x);
}

Tensor lse_rows(const AttentionArgs& args, const Run& run, const Tensor& lse) {
  if (!args.packed())
    return run.count == lse.size(0) ? lse : narrow(lse, 0, run.sequence, run.count);
  const int64_t row = lse.stride(1);
  return view(lse, {run.count, lse.size(0), run.q.length}, {run.q.step * row, lse.stride(0), row},
              run.q.begin * row);
}

Tensor bias_block(const AttentionArgs& args, const Run& run, const Tensor& bias) {
  Tensor block = four_dims(bias);
  if (run.count < args.batch()) block = narrow_broadcast(block, 0, run.sequence, run.count);
  block = narrow_broadcast(block, 2, 0, run.q.length);
  return narrow_broadcast(block, 3, 0, run.k.length);
}

void clear_unowned_rows(const AttentionArgs& args, const Tensor& out, const Tensor& lse) {
  if (!args.packed()) return;
  const int64_t end = host_ints(args.cu_seqlens_q)[args.batch()];
  const int64_t rows = out.size(0) - end;
  if (rows <= 0) return;
  fill_(narrow(out, 0, end, rows), 0);
  fill_(narrow(lse, 1, end, rows), std::numeric_limits<double>::infinity());
}

}  // namespace anyflash
