#include "routes/dense.h"

#include <algorithm>
#include <limits>

#include "attention/results.h"
#include "routes/far_rows.h"

namespace anyflash {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Tensor exp_(const Tensor& x) { return aten<Tensor>("aten::exp_", "", x); }
Tensor mul_(const Tensor& x, const Tensor& y) { return aten<Tensor>("aten::mul_", "Tensor", x, y); }
Tensor mul_(const Tensor& x, double factor) { return factor == 1 ? x : mul_(x, scalar(factor)); }
Tensor less(const Tensor& a, const Tensor& b) { return aten<Tensor>("aten::lt", "Tensor", a, b); }
Tensor where(const Tensor& condition, const Tensor& yes, const Tensor& no) {
  return aten<Tensor>("aten::where", "self", condition, yes, no);
}
Tensor equal(const Tensor& a, double b) { return aten<Tensor>("aten::eq", "Tensor", a, scalar(b)); }
void fill_where_(const Tensor& x, const Tensor& where, double value) {
  aten<Tensor>("aten::masked_fill_", "Tensor", x, where, scalar(value));
}

// (n, keys, heads_k, d) -> (n * heads_k, keys, d), contiguous
Tensor flat_keys(const Tensor& x, ScalarType dtype) {
  const Tensor result = empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x, dtype);
  copy_(result, transpose(x, 1, 2));
  return view(result, {x.size(0) * x.size(2), x.size(1), x.size(3)},
              {x.size(1) * x.size(3), x.size(3), 1});
}

// (n * heads_k, keys, d) -> (n, keys, heads_k, d)
void store_keys(const Tensor& destination, const Tensor& x) {
  copy_(destination, transpose(split_dim(x, 0, destination.size(2)), 1, 2));
}

// sum[.., keys of the chunk, ..] += a b
void add_product(const Tensor& sum, const Tensor& a, const Tensor& b) {
  copy_(sum, add(sum, bmm(a, b)));
}

}  // namespace

DenseAttention::DenseAttention(const AttentionArgs& args, const DenseBatch& batch)
    : args_(args),
      batch_(batch),
      dtype_(accumulator_type(args.q)),
      sequences_(batch.q.size(0)),
      heads_(args.heads()),
      heads_k_(args.heads_k()),
      group_(heads_ / heads_k_),
      mask_(args, batch),
      keys_(flat_keys(batch.k, dtype_)),
      values_(flat_keys(batch.v, dtype_)) {
  const auto own_sequences = [&](const Tensor& x) {
    return narrow_broadcast(x, 0, batch.sequence, sequences_);
  };
  if (args.alibi_slopes) {
    const Tensor slopes =
        args.alibi_slopes->dim() == 1 ? unsqueeze(*args.alibi_slopes, 0) : *args.alibi_slopes;
    slopes_ = to_dtype(own_sequences(unsqueeze(unsqueeze(slopes, -1), -1)), dtype_);
  }
  if (args.bias) bias_ = own_sequences(four_dims(*args.bias));
  if (args.sinks)
    sinks_ = to_dtype(unsqueeze(unsqueeze(unsqueeze(*args.sinks, 0), -1), -1), dtype_);
  if (args.dropout_p > 0) dropout_.emplace(args);
}

// Heads that share keys side by side: (n, rows of x, heads, d) -> (n * heads_k, group * rows, d),
// contiguous, in dtype_.
Tensor DenseAttention::grouped_rows(const Tensor& x, const Chunk& chunk) const {
  const Tensor result = empty({sequences_, heads_, chunk.rows, x.size(3)}, x, dtype_);
  copy_(result, transpose(narrow(x, 1, chunk.row, chunk.rows), 1, 2));
  return by_group(result, chunk, x.size(3));
}

// The reverse of grouped_rows into the chunk's rows of `destination`.
void DenseAttention::store_rows(const Tensor& destination, const Chunk& chunk,
                                const Tensor& x) const {
  copy_(transpose(narrow(destination, 1, chunk.row, chunk.rows), 1, 2),
        by_head(x, chunk, destination.size(3)));
}

Tensor DenseAttention::chunk_keys(const Tensor& x, const Chunk& chunk) const {
  return narrow(x, 1, chunk.key, chunk.keys);
}

// Contiguous (n * heads_k, group * rows, columns) as (n, heads, rows, columns), and back.
Tensor DenseAttention::by_head(const Tensor& x, const Chunk& chunk, int64_t columns) const {
  const int64_t head = chunk.rows * columns;
  return view(x, {sequences_, heads_, chunk.rows, columns}, {heads_ * head, head, columns, 1});
}
Tensor DenseAttention::by_group(const Tensor& x, const Chunk& chunk, int64_t columns) const {
  const int64_t rows = group_ * chunk.rows;
  return view(x, {sequences_ * heads_k_, rows, columns}, {rows * columns, columns, 1});
}

Tensor DenseAttention::lse_rows(const Tensor& lse, const Chunk& chunk) const {
  return unsqueeze(narrow(lse, 2, chunk.row, chunk.rows), -1);
}

Tensor DenseAttention::alibi(const Chunk& chunk) const {
  const Tensor keys = mask_.keys(chunk);
  if (args_.purely_causal()) return mul(*slopes_, keys);
  return mul(mul(*slopes_, -1), aten<Tensor>("aten::abs", "", sub(mask_.diagonal(chunk), keys)));
}

OptionalTensor DenseAttention::dropped(const Chunk& chunk) const {
  if (!dropout_) return std::nullopt;
  const Tensor result =
      dropout_->dropped(batch_.sequence, sequences_, chunk.row, chunk.rows, chunk.key, chunk.keys);
  return split_dim(result, 0, heads_);
}

// `queries`: grouped_rows times the softmax scale.
DenseAttention::Scores DenseAttention::scores(const Tensor& queries, const Chunk& chunk,
                                              bool keep_tanh) const {
  Scores result{by_head(bmm(queries, transpose(chunk_keys(keys_, chunk), 1, 2)), chunk, chunk.keys),
                std::nullopt};
  Tensor& s = result.values;
  if (args_.softcap > 0) {
    const Tensor tanh = aten<Tensor>("aten::tanh_", "", mul_(s, 1 / args_.softcap));
    if (keep_tanh) {
      result.tanh = tanh;
      s = mul(tanh, args_.softcap);
    } else {
      s = mul_(tanh, args_.softcap);
    }
  }
  if (slopes_) s = add(s, alibi(chunk));
  if (bias_) {
    const Tensor bias = bias_chunk(*bias_, chunk);
    if (bias.scalar_type() == ScalarType::Bool) {
      fill_where_(s, aten<Tensor>("aten::logical_not", "", bias), -kInfinity);
    } else {
      s = add(s, to_dtype(bias, dtype_));
    }
  }
  // Last: a bias may hold anything where nothing is used.
  if (mask_.hides()) fill_where_(s, mask_.hidden(chunk), -kInfinity);
  return result;
}

// The largest logit of each row, the sink among them; 0 of a row without any.
Tensor DenseAttention::reference_of(const Tensor& row_max) const {
  const Tensor max = sinks_ ? aten<Tensor>("aten::maximum", "", row_max, *sinks_) : mul(row_max, 1);
  fill_where_(max, equal(max, -kInfinity), 0);
  return max;
}

// 1 / the sum of a far row's weights exp(logit - reference), 1 of the others. A log-sum-exp that is
// larger by more than rounding has other keys in it, which these are nothing beside.
Tensor DenseAttention::weight_of_far_rows(const Tensor& far, const Tensor& p,
                                          const Tensor& reference, const Tensor& lse) const {
  Tensor total = sum(p, {-1}, true);
  if (sinks_) total = add(total, exp_(sub(*sinks_, reference)));
  const Tensor own_lse = add(reference, aten<Tensor>("aten::log", "", total));
  const Tensor slack = mul(aten<Tensor>("aten::abs", "", lse), 0x1p-12);
  fill_where_(total, less(own_lse, sub(lse, slack)), kInfinity);
  return where(far, aten<Tensor>("aten::reciprocal", "", total),
               full({}, 1, total, total.scalar_type()));
}

void DenseAttention::forward_chunk(const Chunk& chunk, const Tensor& out, const Tensor& lse) const {
  const Tensor queries = mul_(grouped_rows(batch_.q, chunk), args_.softmax_scale);
  const Tensor s = scores(queries, chunk, /*keep_tanh=*/false).values;
  const Tensor row_max = amax(s, -1, true);
  const Tensor dead = equal(row_max, -kInfinity);  // no visible key
  const Tensor max = reference_of(row_max);
  const Tensor p = exp_(sub(s, max));
  Tensor total = sum(p, {-1}, true);
  if (sinks_) total = add(total, exp_(sub(*sinks_, max)));
  const Tensor row_lse = add(aten<Tensor>("aten::log", "", total), max);
  fill_where_(row_lse, dead, kInfinity);
  copy_(lse_rows(lse, chunk), row_lse);

  if (const OptionalTensor drop = dropped(chunk)) {
    fill_where_(p, *drop, 0);
    total = mul_(total, 1 / dropout_->kept_scale());
  }
  const Tensor sums =
      by_head(bmm(by_group(p, chunk, chunk.keys), chunk_keys(values_, chunk)), chunk, out.size(3));
  const Tensor row_out = aten<Tensor>("aten::div_", "Tensor", sums, total);
  fill_where_(row_out, dead, 0);
  store_rows(out, chunk, row_out);
}

void DenseAttention::forward(const Tensor& out, const Tensor& lse) const {
  for (const Chunk& chunk : mask_.chunks()) {
    if (chunk.keys > 0) {
      forward_chunk(chunk, out, lse);
    } else {
      fill_(narrow(out, 1, chunk.row, chunk.rows), 0);
      fill_(narrow(lse, 2, chunk.row, chunk.rows), kInfinity);
    }
  }
}

namespace {

// Sums `x` over the dimensions that `like` broadcasts.
Tensor reduce_like(const Tensor& x, const Tensor& like) {
  std::vector<int64_t> dims;
  for (int64_t dim = 0; dim < 4; ++dim) {
    if (like.size(dim) == 1 && x.size(dim) != 1) dims.push_back(dim);
  }
  return dims.empty() ? x : sum(x, dims, true);
}

void accumulate(const Tensor& destination, const Tensor& x) {
  copy_(destination, add(destination, x));
}

}  // namespace

void DenseAttention::backward_chunk(const Chunk& chunk, const DenseGrad& grad,
                                    const DenseGradResult& result, const Tensor& sum_dk,
                                    const Tensor& sum_dv) const {
  const Tensor queries = mul_(grouped_rows(batch_.q, chunk), args_.softmax_scale);
  const Tensor lse = lse_rows(grad.lse, chunk);
  const Tensor dead = equal(lse, kInfinity);
  const Tensor dout = grouped_rows(grad.dout, chunk);
  fill_where_(by_head(dout, chunk, dout.size(2)), dead, 0);
  // d score = p (dp - offset), offset = sum over keys of p dp, less the gradient of the log-sum-exp
  Tensor offset = sum(mul(by_head(dout, chunk, dout.size(2)),
                          by_head(grouped_rows(grad.out, chunk), chunk, dout.size(2))),
                      {-1}, true);
  if (grad.dlse) {
    const Tensor dlse = mul(lse_rows(*grad.dlse, chunk), 1);
    fill_where_(dlse, dead, 0);
    offset = sub(offset, dlse);
  }
  const Scores scores = this->scores(queries, chunk, /*keep_tanh=*/true);
  const OptionalTensor far = far_rows(lse);
  const Tensor reference =
      far ? where(*far, reference_of(amax(scores.values, -1, true)), lse) : lse;
  const Tensor p = exp_(sub(scores.values, reference));
  if (far) {
    // Everything is linear in dout and offset, which therefore take the sum of the weights.
    const Tensor weight = weight_of_far_rows(*far, p, reference, lse);
    mul_(by_head(dout, chunk, dout.size(2)), weight);
    offset = mul(offset, weight);
  }
  if (result.dsinks) {
    const Tensor sink_p = exp_(sub(*sinks_, reference));
    accumulate(*result.dsinks, sum(mul(sink_p, mul(offset, -1)), {0, 2, 3}));
  }

  Tensor dp = by_head(bmm(dout, transpose(chunk_keys(values_, chunk), 1, 2)), chunk, chunk.keys);
  if (const OptionalTensor drop = dropped(chunk)) {
    fill_where_(dp, *drop, 0);
    mul_(dp, dropout_->kept_scale());
    const Tensor kept = mul(p, dropout_->kept_scale());
    fill_where_(kept, *drop, 0);
    add_product(chunk_keys(sum_dv, chunk), transpose(by_group(kept, chunk, chunk.keys), 1, 2),
                dout);
  } else {
    add_product(chunk_keys(sum_dv, chunk), transpose(by_group(p, chunk, chunk.keys), 1, 2), dout);
  }
  dp = sub(dp, offset);
  const Tensor ds = mul_(dp, p);
  if (result.dbias) {
    const Tensor part =
        bias_chunk(narrow_broadcast(*result.dbias, 0, batch_.sequence, sequences_), chunk);
    accumulate(part, reduce_like(ds, part));
  }
  if (scores.tanh) mul_(ds, sub(scalar(1.0), mul_(*scores.tanh, *scores.tanh)));

  const Tensor flat_ds = by_group(ds, chunk, chunk.keys);
  store_rows(result.dq, chunk, mul_(bmm(flat_ds, chunk_keys(keys_, chunk)), args_.softmax_scale));
  add_product(chunk_keys(sum_dk, chunk), transpose(flat_ds, 1, 2), queries);
}

void DenseAttention::backward(const DenseGrad& grad, const DenseGradResult& result) const {
  const Tensor sum_dk = full(keys_.sizes(), 0, keys_, dtype_);
  const Tensor sum_dv = full(values_.sizes(), 0, values_, dtype_);
  for (const Chunk& chunk : mask_.chunks()) {
    if (chunk.keys > 0) {
      backward_chunk(chunk, grad, result, sum_dk, sum_dv);
    } else {
      fill_(narrow(result.dq, 1, chunk.row, chunk.rows), 0);
    }
  }
  store_keys(result.dk, sum_dk);
  store_keys(result.dv, sum_dv);
}

}  // namespace anyflash
