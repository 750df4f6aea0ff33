// The routes of routes.def: each computes what its row promises, and nothing is checked twice here.
#pragma once

#include "attention/arguments.h"

namespace anyflash {

namespace aten_cpu {  // PyTorch's CPU flash attention, in pieces that need no mask
ForwardResult forward(const AttentionArgs& args);
Gradients backward(const AttentionArgs& args, const BackwardArgs& grad);
}  // namespace aten_cpu

namespace aten_flash {  // aten::_flash_attention_forward / _backward
ForwardResult forward(const AttentionArgs& args);
Gradients backward(const AttentionArgs& args, const BackwardArgs& grad);
}  // namespace aten_flash

namespace aten_efficient {  // aten::_efficient_attention_forward / _backward
ForwardResult forward(const AttentionArgs& args);
Gradients backward(const AttentionArgs& args, const BackwardArgs& grad);
}  // namespace aten_efficient

namespace aten_cudnn {  // aten::_scaled_dot_product_cudnn_attention / _backward
ForwardResult forward(const AttentionArgs& args);
Gradients backward(const AttentionArgs& args, const BackwardArgs& grad);
}  // namespace aten_cudnn

namespace aten_sdpa {  // aten::scaled_dot_product_attention; the log-sum-exp is NaN
ForwardResult forward(const AttentionArgs& args);
}  // namespace aten_sdpa

namespace math {  // composed from plain operators in query chunks: everything, everywhere
ForwardResult forward(const AttentionArgs& args);
Gradients backward(const AttentionArgs& args, const BackwardArgs& grad);
}  // namespace math

}  // namespace anyflash
