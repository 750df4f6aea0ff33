// PyTorch's CPU flash attention. It knows square causal masks and explicit ones; everything else is
// cut into pieces (pieces.h).
#include <algorithm>
#include <limits>

#include "attention/results.h"
#include "core/interface.h"
#include "routes/far_rows.h"
#include "routes/routes.h"
#include "routes/runs.h"

namespace anyflash::aten_cpu {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Tensors of one run, (count, length, heads, head_dim) and (count, heads, length).
struct Block {
  Tensor out;
  Tensor lse;
};

// fp16 GEMMs are emulated on most CPUs (a hundred times slower): computed in fp32.
Tensor computable(const Tensor& x) {
  return x.scalar_type() == ScalarType::Half ? to_dtype(x, ScalarType::Float) : x;
}

Tensor rows_of(const Tensor& x, const Piece& piece) {  // dim 1
  return piece.rows() == x.size(1) ? x : narrow(x, 1, piece.row_begin, piece.rows());
}

Tensor keys_of(const Tensor& x, const Piece& piece) {  // dim 1
  return piece.keys() == x.size(1) ? x : narrow(x, 1, piece.key_begin, piece.keys());
}

Tensor lse_of(const Tensor& x, const Piece& piece) {  // dim 2
  return piece.rows() == x.size(2) ? x : narrow(x, 2, piece.row_begin, piece.rows());
}

template <class T>
void write_interval_mask(const IntervalMask<int64_t>& mask, const Piece& piece, T* row_data) {
  for (int64_t row = piece.row_begin; row < piece.row_end; ++row, row_data += piece.keys()) {
    const int64_t begin = std::max(mask.kv_begin(row), piece.key_begin) - piece.key_begin;
    const int64_t end = std::min(mask.kv_end(row), piece.key_end) - piece.key_begin;
    std::fill_n(row_data, piece.keys(), -static_cast<T>(kInfinity));
    if (begin < end) std::fill(row_data + begin, row_data + end, T{0});
  }
}

// 0 where the piece's row sees the key, else -inf: (rows, keys), of the one type PyTorch takes
// besides q's own (beside fp64: only that).
Tensor interval_mask(const IntervalMask<int64_t>& mask, const Piece& piece, const Tensor& q) {
  const Tensor result = empty({piece.rows(), piece.keys()}, q, accumulator_type(q));
  if (accumulator_type(q) == ScalarType::Double) {
    write_interval_mask(mask, piece, static_cast<double*>(result.data_ptr()));
  } else {
    write_interval_mask(mask, piece, static_cast<float*>(result.data_ptr()));
  }
  return result;
}

IntervalMask<int64_t> interval_of(const AttentionArgs& args, const Run& run) {
  return {run.q.length, run.k.length, args.window_left, args.window_right};
}

Plan plan_run(const AttentionArgs& args, const Run& run, PlanFor purpose) {
  // PyTorch's causal mask comes before the scale: -inf times 0 or a negative number.
  const bool is_explicit = args.bias || args.softmax_scale <= 0;
  const IntervalMask<int64_t> mask = interval_of(args, run);
  Plan plan;
  plan.pieces.resize(16);
  for (;;) {
    const auto room = static_cast<int64_t>(plan.pieces.size());
    const int64_t count =
        anyflash_plan_pieces(mask.seqlen_q, mask.seqlen_k, mask.window_left, mask.window_right,
                             is_explicit ? PlanFor::kExplicit : purpose, plan.pieces.data(), room,
                             &plan.row_begin, &plan.row_end);
    plan.pieces.resize(static_cast<size_t>(count));
    if (count <= room) return plan;
  }
}

bool covers_all_rows(const Plan& plan, const Run& run) {
  return plan.row_begin == 0 && plan.row_end == run.q.length;
}

// One run of a problem: lengths are plain numbers here.
class RunProblem {
 public:
  RunProblem(const AttentionArgs& args, const Run& run)
      : scale_(args.softmax_scale),
        mask_(interval_of(args, run)),
        q_(computable(query_rows(args, run, args.q))),
        k_(computable(key_rows(args, run, args.k))),
        v_(computable(key_rows(args, run, args.v))) {
    if (args.bias) bias_ = additive(bias_block(args, run, *args.bias));
  }

  Block attend(const Piece& piece) const {
    const OptionalTensor mask = explicit_mask(piece);
    auto [out, lse] = aten<std::tuple<Tensor, Tensor>>(
        "aten::_scaled_dot_product_flash_attention_for_cpu", "",
        transpose(rows_of(q_, piece), 1, 2), transpose(keys_of(k_, piece), 1, 2),
        transpose(keys_of(v_, piece), 1, 2), 0.0, piece.mask == Piece::Mask::kCausal, mask,
        std::optional<double>(scale_));
    out = transpose(out, 1, 2);
    if (bias_) clear_dead_rows(*mask, out, lse);
    return {out, lse};
  }

  // dq, dk, dv of one piece; `out` and `lse` are those of the whole rows.
  std::tuple<Tensor, Tensor, Tensor> differentiate(const Piece& piece, const Tensor& dout,
                                                   const Tensor& out, const Tensor& lse) const {
    auto [dq, dk, dv] = aten<std::tuple<Tensor, Tensor, Tensor>>(
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward", "",
        transpose(rows_of(dout, piece), 1, 2), transpose(rows_of(q_, piece), 1, 2),
        transpose(keys_of(k_, piece), 1, 2), transpose(keys_of(v_, piece), 1, 2),
        transpose(rows_of(out, piece), 1, 2), lse_of(lse, piece), 0.0,
        piece.mask == Piece::Mask::kCausal, explicit_mask(piece), std::optional<double>(scale_));
    return {transpose(dq, 1, 2), transpose(dk, 1, 2), transpose(dv, 1, 2)};
  }

 private:
  // Bias as the scores take it: a float mask of a type that PyTorch accepts beside q.
  Tensor additive(const Tensor& bias) const {
    if (bias.scalar_type() == ScalarType::Bool) {
      const Tensor result = full(bias.sizes(), -kInfinity, bias, accumulator_type(q_));
      aten<Tensor>("aten::masked_fill_", "Tensor", result, bias, scalar(0.0));
      return result;
    }
    return bias.scalar_type() == q_.scalar_type() ? bias : to_dtype(bias, accumulator_type(q_));
  }

  OptionalTensor explicit_mask(const Piece& piece) const {
    OptionalTensor mask;
    if (piece.mask == Piece::Mask::kInterval) mask = interval_mask(mask_, piece, q_);
    if (!bias_) return mask;
    const Tensor bias = narrow_broadcast(narrow_broadcast(*bias_, 2, piece.row_begin, piece.rows()),
                                         3, piece.key_begin, piece.keys());
    return mask ? to_dtype(add(bias, *mask), bias.scalar_type()) : bias;
  }

  // PyTorch gives a row whose keys are all at -inf the log-sum-exp 0. `mask`: (batch or 1, heads or
  // 1, rows or 1, keys or 1).
  static void clear_dead_rows(const Tensor& mask, const Tensor& out, const Tensor& lse) {
    const Tensor dead = aten<Tensor>("aten::eq", "Tensor", amax(mask, -1),
                                     scalar(-kInfinity));  // (batch, heads, rows)
    aten<Tensor>("aten::masked_fill_", "Tensor", lse, dead, scalar(kInfinity));
    aten<Tensor>("aten::masked_fill_", "Tensor", transpose(out, 1, 2), unsqueeze(dead, -1),
                 scalar(0.0));
  }

  const double scale_;
  const IntervalMask<int64_t> mask_;
  const Tensor q_, k_, v_;
  OptionalTensor bias_;
};

// The result of two pieces of the same rows.
Block merge(const Block& a, const Block& b) {
  const ScalarType dtype = accumulator_type(a.out);
  const Tensor lse = aten<Tensor>("aten::logaddexp", "", a.lse, b.lse);
  const Tensor weight =
      unsqueeze(transpose(aten<Tensor>("aten::sigmoid", "", sub(b.lse, a.lse)), 1, 2), -1);
  return {
      aten<Tensor>("aten::lerp", "Tensor", to_dtype(a.out, dtype), to_dtype(b.out, dtype), weight),
      lse};
}

// The plan of a problem that is one call, whose results need no copy.
std::optional<Piece> single_call(const AttentionArgs& args, const std::vector<Run>& runs,
                                 PlanFor purpose) {
  if (args.packed() || runs.size() != 1 || runs[0].count != args.q.size(0)) return std::nullopt;
  const Plan plan = plan_run(args, runs[0], purpose);
  if (plan.pieces.size() != 1 || !covers_all_rows(plan, runs[0])) return std::nullopt;
  return plan.pieces[0];
}

void forward_run(const AttentionArgs& args, const Run& run, const Tensor& out, const Tensor& lse) {
  const Plan plan = plan_run(args, run, PlanFor::kForward);
  const Tensor run_out = query_rows(args, run, out);
  const Tensor run_lse = lse_rows(args, run, lse);
  if (!covers_all_rows(plan, run)) {
    fill_(run_out, 0);
    fill_(run_lse, kInfinity);
  }
  if (plan.pieces.empty()) return;
  const RunProblem problem(args, run);
  for (size_t n = 0; n < plan.pieces.size(); ++n) {
    const Piece& piece = plan.pieces[n];
    Block block = problem.attend(piece);
    if (n + 1 < plan.pieces.size() && plan.pieces[n + 1].merges) {
      block = merge(block, problem.attend(plan.pieces[++n]));
    }
    copy_(rows_of(run_out, piece), block.out);
    copy_(lse_of(run_lse, piece), block.lse);
  }
}

// Sums pieces of a key gradient into (count, length, heads_k, head_dim): keys below `written` hold
// a sum, the others nothing yet.
void accumulate(const Tensor& sum, int64_t written, const Piece& piece, const Tensor& x) {
  const int64_t shared = std::clamp<int64_t>(written - piece.key_begin, 0, piece.keys());
  if (shared > 0) {
    const Tensor part = narrow(sum, 1, piece.key_begin, shared);
    copy_(part, add(part, narrow(x, 1, 0, shared)));
  }
  if (shared < piece.keys()) {
    copy_(narrow(sum, 1, piece.key_begin + shared, piece.keys() - shared),
          narrow(x, 1, shared, piece.keys() - shared));
  }
}

// The gradients are zero on entry.
void backward_run(const AttentionArgs& args, const BackwardArgs& grad, const Run& run,
                  const Gradients& result) {
  const std::vector<Piece> pieces = plan_run(args, run, PlanFor::kBackward).pieces;
  if (pieces.empty()) return;
  const RunProblem problem(args, run);
  const Tensor dout = computable(query_rows(args, run, grad.dout));
  const Tensor out = computable(query_rows(args, run, grad.out));
  const Tensor lse = lse_rows(args, run, grad.lse);
  const Tensor run_dq = query_rows(args, run, result.dq);
  const Tensor run_dk = key_rows(args, run, result.dk);
  const Tensor run_dv = key_rows(args, run, result.dv);
  // Sums of many low-precision parts are kept in fp32.
  const bool sums = pieces.size() > 2 && run_dk.scalar_type() != accumulator_type(run_dk);
  const Tensor sum_dk = sums ? full(run_dk.sizes(), 0, run_dk, accumulator_type(run_dk)) : run_dk;
  const Tensor sum_dv = sums ? full(run_dv.sizes(), 0, run_dv, accumulator_type(run_dv)) : run_dv;
  int64_t written = pieces[0].key_begin;
  for (const Piece& piece : pieces) {
    const auto [dq, dk, dv] = problem.differentiate(piece, dout, out, lse);
    const Tensor piece_dq = rows_of(run_dq, piece);
    copy_(piece_dq, piece.merges ? add(piece_dq, dq) : dq);
    accumulate(sum_dk, written, piece, dk);
    accumulate(sum_dv, written, piece, dv);
    written = std::max(written, piece.key_end);
  }
  if (sums) {
    copy_(run_dk, sum_dk);
    copy_(run_dv, sum_dv);
  }
}

}  // namespace

ForwardResult forward(const AttentionArgs& args) {
  const std::vector<Run> runs = split_runs(args);
  if (const auto piece = single_call(args, runs, PlanFor::kForward)) {
    const Block block = RunProblem(args, runs[0]).attend(*piece);
    return {as_promised(block.out, args.q), contiguous(block.lse)};
  }
  const Tensor out = new_out(args);
  const Tensor lse = new_lse(args);
  clear_unowned_rows(args, out, lse);
  for (const Run& run : runs) forward_run(args, run, out, lse);
  return {out, lse};
}

Gradients backward(const AttentionArgs& args, const BackwardArgs& grad) {
  if (far_rows(grad.lse)) return math::backward(args, grad);
  const std::vector<Run> runs = split_runs(args);
  const auto piece = single_call(args, runs, PlanFor::kBackward);
  if (piece && piece->keys() == args.k.size(1)) {
    const auto [dq, dk, dv] =
        RunProblem(args, runs[0])
            .differentiate(*piece, computable(grad.dout), computable(grad.out), grad.lse);
    return promised_gradients(args, dq, dk, dv);
  }
  const Gradients result = no_gradients(args);
  for (const Run& run : runs) backward_run(args, grad, run, result);
  return result;
}

}  // namespace anyflash::aten_cpu
