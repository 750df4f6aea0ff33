// Operator registration on libtorch's C interface. Torch's own macro is not used: where a name is
// taken already (the Python provider, a second copy of this library) it ends the process or
// replaces the other definition without a word.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <string>
#include <vector>

namespace anyflash {

struct Kernel {
  const char* dispatch_key;
  const char* name;
  void (*boxed)(StableIValue* stack, uint64_t arguments, uint64_t results);
};

// Defines every schema in the library `name_space`, then adds the kernels. All or nothing: after a
// failure no definition of this call is left. Returns "" or what went wrong.
std::string register_operators(const char* name_space, const std::vector<const char*>& schemas,
                               const std::vector<Kernel>& kernels);

}  // namespace anyflash
