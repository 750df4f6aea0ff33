// From tensors to the value that decide() reads.
#pragma once

#include "attention.h"
#include "problem.h"

namespace anyflash {

// Lengths and windows as AttentionArgs promises them: dense and paged lengths from the shapes, a
// window that reaches every key unbounded, causal as window_right = 0. To be called before
// validation, which reads the lengths.
void normalise(AttentionArgs& args, bool causal);

Problem describe_forward(const AttentionArgs& args, int64_t backend);
Problem describe_backward(const AttentionArgs& args, const BackwardArgs& grad, int64_t backend);
Problem describe_bias_activation(const Tensor& x, Direction direction, int64_t backend);
Problem describe_rowwise(const Tensor& x, Family family, Direction direction);
Problem describe_kvcache_append(const Tensor& k_cache, const Tensor& v_cache, int64_t backend);

}  // namespace anyflash
