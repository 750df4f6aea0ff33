#include "cpu/attention_kernel.h"

#include "attention_params.h"
#include "fallback/promised.h"
#include "fallback/runs.h"
#include "launch.h"
#include "layout.h"
#include "stable/aten.h"

namespace anyflash::cpu_kernel {
namespace {

AttentionInputs inputs_of(const AttentionArgs& args) {
  return {args, contiguous_last_dim(args.q), contiguous_last_dim(args.k),
          contiguous_last_dim(args.v)};
}

KernelOutput output(const Tensor& promised) { return {promised, contiguous_last_dim(promised)}; }

// Rows of packed storage that belong to a sequence.
int64_t owned_rows(const OptionalTensor& cu_seqlens) {
  return static_cast<const int32_t*>(cu_seqlens->const_data_ptr())[cu_seqlens->size(0) - 1];
}

void clear_from(const Tensor& x, int64_t row) {
  if (row < x.size(0)) fill_(narrow(x, 0, row, x.size(0) - row), 0);
}

// The kernel writes the rows of keys that some sequence uses.
void clear_unused_keys(const AttentionArgs& args, const Tensor& gradient) {
  if (args.seqused_k || args.leftpad_k) {
    fill_(gradient, 0);
  } else if (args.cu_seqlens_k) {
    clear_from(gradient, owned_rows(args.cu_seqlens_k));
  }
}

}  // namespace

ForwardResult forward(const Instance& instance, const AttentionArgs& args) {
  AttentionInputs inputs = inputs_of(args);
  const KernelOutput out = output(new_out(args));
  const Tensor lse = new_lse(args);
  clear_unowned_rows(args, out.written(), lse);
  inputs.params.out = rows_of(out.written());
  inputs.params.lse = statistics_of(lse);
  launch(instance, &inputs.params, args.q);
  return {out.finish(), lse};
}

Gradients backward(const Instance& instance, const AttentionArgs& args, const BackwardArgs& grad) {
  AttentionInputs inputs = inputs_of(args);
  AttentionParams& params = inputs.params;
  const Tensor out = contiguous_last_dim(grad.out);
  const Tensor dout = contiguous_last_dim(grad.dout);
  const Tensor lse = contiguous_last_dim(grad.lse);
  OptionalTensor dlse = contiguous_last_dim(grad.dlse);
  if (dlse) dlse = to_dtype(*dlse, ScalarType::Float);
  params.out = rows_of(out);
  params.dout = rows_of(dout);
  params.lse = statistics_of(lse);
  if (dlse) params.dlse = statistics_of(*dlse);

  const KernelOutput dq = output(empty_like(args.q)), dk = output(empty_like(args.k)),
                     dv = output(empty_like(args.v));
  if (args.packed()) clear_from(dq.written(), owned_rows(args.cu_seqlens_q));
  clear_unused_keys(args, dk.written());
  clear_unused_keys(args, dv.written());
  params.dq = rows_of(dq.written());
  params.dk = rows_of(dk.written());
  params.dv = rows_of(dv.written());

  OptionalTensor dbias, dsinks;
  if (grad.bias_requires_grad) {
    dbias = full(args.bias->sizes(), 0, args.q, ScalarType::Float);
    params.dbias = static_cast<float*>(dbias->data_ptr());
    copy_broadcast_strides(*dbias, params.dbias_stride);
  }
  if (grad.sinks_requires_grad) {
    dsinks = full(args.sinks->sizes(), 0, args.q, ScalarType::Float);
    params.dsinks = static_cast<float*>(dsinks->data_ptr());
  }
  launch(instance, &params, args.q);
  Gradients result{dq.finish(), dk.finish(), dv.finish(), std::nullopt, std::nullopt};
  if (dbias) result.dbias = to_dtype(*dbias, args.bias->scalar_type());
  if (dsinks) result.dsinks = to_dtype(*dsinks, args.sinks->scalar_type());
  return result;
}

}  // namespace anyflash::cpu_kernel
