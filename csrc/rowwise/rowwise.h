// The families around attention (rotary, norm, cross entropy): kernels on the CPU alone. Other
// devices, and dtypes without a kernel, are served above: Python's math is the operators' kernel
// for every other dispatch key, and the public functions never bring such a tensor here.
#pragma once

#include "kernels/launch.h"
#include "stable/aten.h"

namespace anyflash {

// The kernel for tensors like x. Raises where there is none.
const Instance& rowwise_kernel(const Tensor& x, Family family, Direction direction);

}  // namespace anyflash
