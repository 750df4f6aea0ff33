// From a call to the value that decide() reads.
#pragma once

#include "core/problem.h"
#include "core/tensor_view.h"

namespace anyflash {

// Who calls, and what was asked of the decision.
struct Caller {
  int64_t backend = 0;        // an order; 0: ANYFLASH_BACKEND, or the default
  int32_t torch_version = 0;  // 213 = 2.13
};

// What a problem says of the machine. Raises std::invalid_argument while ANYFLASH_CPU_ISA names an
// instruction set that is none.
Problem describe_machine(Device device, int32_t device_index);

// What all families have in common. Raises std::invalid_argument for a backend that is none.
Problem describe(const TensorView& x, Family family, Direction direction, const Caller& caller);

}  // namespace anyflash
