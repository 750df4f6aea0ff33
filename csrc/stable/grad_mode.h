// Calls into aten from inside an operator must not record a graph of their own: the operator's
// gradient is its backward operator.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace anyflash {

class NoGrad {
 public:
  NoGrad() : was_enabled_(aoti_torch_grad_mode_is_enabled()) {
    if (was_enabled_) aoti_torch_grad_mode_set_enabled(false);
  }
  ~NoGrad() {
    if (was_enabled_) aoti_torch_grad_mode_set_enabled(true);
  }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool was_enabled_;
};

}  // namespace anyflash
