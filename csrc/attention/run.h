// Prepare and run, for every operator that ends in a forward pass.
#pragma once

#include "attention/arguments.h"
#include "core/attention.h"

namespace anyflash {

// The arguments as the core sees them. `host_copies` lives as long as the views.
AttentionCall views_of(const AttentionArgs& args, std::vector<Tensor>& host_copies);

ForwardResult run_forward(const Choice& choice, const AttentionArgs& args,
                          const AttentionCall& call);

// The route `kernel`. `call` are the views of `args`, prepared.
namespace kernel {
ForwardResult forward(const Instance& instance, const AttentionArgs& args, AttentionCall call);
Gradients backward(const Instance& instance, const AttentionArgs& args, const BackwardArgs& grad,
                   AttentionCall call, const BackwardCall& grad_call);
}  // namespace kernel

}  // namespace anyflash
