// Decide and run, for every operator that ends in a forward pass.
#pragma once

#include "attention.h"

namespace anyflash {

// `args` are normalised and validated. Raises when no back end of the chain can compute them.
ForwardResult run_forward(const AttentionArgs& args, int64_t backend);

}  // namespace anyflash
