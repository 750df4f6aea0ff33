// The route `kernel`: results are allocated, what no kernel reads is converted, the core launches.
#include <cstdint>
#include <vector>

#include "attention/results.h"
#include "attention/run.h"
#include "stable/contiguous_rows.h"
#include "stable/launch_on.h"
#include "stable/view.h"

namespace anyflash::kernel {
namespace {

// CUDA kernels move 16 bytes at a time: 8 elements.
constexpr int64_t kPack = 8;

bool has_aligned_rows(const TensorView& x) {
  if (x.stride(-1) != 1 || x.size(-1) % kPack != 0) return false;
  for (int32_t dim = 0; dim + 1 < x.rank; ++dim) {
    if (x.strides[dim] % kPack != 0) return false;
  }
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// An uninitialised tensor of x's shape with aligned rows, its columns rounded up.
Tensor aligned_empty(const Tensor& x) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = (sizes.back() + kPack - 1) / kPack * kPack;
  return empty(sizes, x, x.scalar_type());
}

// A copy of x with aligned rows and zeros in the columns that x has not.
Tensor aligned(const Tensor& x) {
  const Tensor copy = aligned_empty(x);
  const int64_t last = x.dim() - 1, columns = x.size(last), more = copy.size(last) - columns;
  copy_(narrow(copy, last, 0, columns), x);
  if (more > 0) fill_(narrow(copy, last, columns, more), 0);
  return copy;
}

// Makes the views what a kernel reads; keeps the copies that it takes.
class Converted {
 public:
  Converted(const AttentionArgs& args, AttentionCall& call) {
    if (call.q.device == Device::cuda) {
      align(args.q, call.q);
      align(args.k, call.k);
      align(args.v, call.v);
    }
    if (call.bias.dtype == ElementType::fp64) replace(call.bias, as_float(*args.bias));
    if (call.sinks.given()) replace(call.sinks, contiguous(as_float(*args.sinks)));
  }

  // On a GPU.
  void align(const Tensor& x, TensorView& view) {
    if (!has_aligned_rows(view)) replace(view, aligned(x));
  }
  void replace(TensorView& view, const Tensor& tensor) {
    kept_.push_back(tensor);
    view = view_of(tensor);
  }
  static Tensor as_float(const Tensor& x) { return to_dtype(x, ScalarType::Float); }

 private:
  std::vector<Tensor> kept_;
};

// A result in the layout that the operators promise, and the tensor that the kernel writes: the
// same, or one with other strides and perhaps more columns.
class Output {
 public:
  explicit Output(const Tensor& promised)
      : promised_(promised), written_(promised), view_(view_to_write(promised)) {
    if (view_.device == Device::cuda ? has_aligned_rows(view_) : has_contiguous_rows(promised)) {
      return;
    }
    written_ = view_.device == Device::cuda
                   ? aligned_empty(promised)
                   : empty(promised.sizes(), promised, promised.scalar_type());
    view_ = view_to_write(written_);
  }
  const Tensor& written() const { return written_; }
  const TensorView& view() const { return view_; }

  Tensor finish() const {
    if (written_.get() != promised_.get()) {
      const int64_t last = promised_.dim() - 1;
      copy_(promised_, narrow(written_, last, 0, promised_.size(last)));
    }
    return promised_;
  }

 private:
  Tensor promised_, written_;
  TensorView view_;
};

// Memory for the time of the call.
OptionalTensor workspace_of(int64_t bytes, const Tensor& q, AttentionResults& results) {
  if (bytes == 0) return std::nullopt;
  const Tensor memory = empty({bytes}, q, ScalarType::Byte);
  results.workspace = memory.mutable_data_ptr();
  return memory;
}

}  // namespace

ForwardResult forward(const Instance& instance, const AttentionArgs& args, AttentionCall call) {
  const Output out(new_out(args));
  const Tensor lse = new_lse(args);
  if (lse.numel() == 0) return {out.finish(), lse};
  const Converted converted(args, call);
  AttentionResults results;
  results.out = out.view();
  results.lse = view_to_write(lse);
  const LaunchOn where(args.q);
  const OptionalTensor workspace =
      workspace_of(anyflash_attention_forward_workspace(&instance, &call), args.q, results);
  check_status(anyflash_run_attention(&instance, &call, &results, where.get()));
  return {out.finish(), lse};
}

Gradients backward(const Instance& instance, const AttentionArgs& args, const BackwardArgs& grad,
                   AttentionCall call, const BackwardCall& grad_views) {
  Converted converted(args, call);
  BackwardCall grad_call = grad_views;
  const bool on_gpu = call.q.device == Device::cuda;
  if (on_gpu) {
    converted.align(grad.dout, grad_call.dout);
    converted.align(grad.out, grad_call.out);
  }
  const Tensor lse = contiguous_rows(grad.lse);
  grad_call.lse = view_of(lse);
  if (grad.dlse) {
    converted.replace(grad_call.dlse, contiguous_rows(Converted::as_float(*grad.dlse)));
  }
  const Output dq(empty_like(args.q)), dk(empty_like(args.k)), dv(empty_like(args.v));
  if (on_gpu && (args.seqused_k || args.leftpad_k)) {  // kernels write the keys that are used
    fill_(dk.written(), 0);
    fill_(dv.written(), 0);
  }
  AttentionResults results;
  results.dq = dq.view();
  results.dk = dk.view();
  results.dv = dv.view();
  OptionalTensor dbias, dsinks;
  if (grad.bias_requires_grad) {
    dbias = full(args.bias->sizes(), 0, args.q, ScalarType::Float);
    results.dbias = view_to_write(*dbias);
  }
  if (grad.sinks_requires_grad) {
    dsinks = full(args.sinks->sizes(), 0, args.q, ScalarType::Float);
    results.dsinks = view_to_write(*dsinks);
  }
  const LaunchOn where(args.q);
  const OptionalTensor workspace =
      workspace_of(anyflash_attention_backward_workspace(&instance, &call, &grad_call, &results),
                   args.q, results);
  check_status(
      anyflash_run_attention_backward(&instance, &call, &grad_call, &results, where.get()));
  Gradients result{dq.finish(), dk.finish(), dv.finish(), std::nullopt, std::nullopt};
  if (dbias) result.dbias = to_dtype(*dbias, args.bias->scalar_type());
  if (dsinks) result.dsinks = to_dtype(*dsinks, args.sinks->scalar_type());
  return result;
}

}  // namespace anyflash::kernel
