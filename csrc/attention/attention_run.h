// Decide and run, for every operator that ends in a forward pass.
#pragma once

#include "attention.h"
#include "dispatch.h"

namespace anyflash {

// `args` are normalised and validated. Raises when no back end of the chain can compute them.
Choice choose_forward(const AttentionArgs& args, int64_t backend);

ForwardResult run_forward(const Choice& choice, const AttentionArgs& args);

}  // namespace anyflash
