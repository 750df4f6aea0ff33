// Registers every operator of schemas.def when the library is loaded.
#include <torch/csrc/stable/library.h>

#include "core/interface.h"
#include "operators.h"
#include "stable/check.h"
#include "stable/registrar.h"

namespace anyflash {
namespace {

// String arguments are unboxed here: the headers' conversion leaks what it returns.
std::string take(StringHandle handle) {
  const char* characters = nullptr;
  size_t length = 0;
  check_code(torch_string_length(handle, &length), "string");
  check_code(torch_string_c_str(handle, &characters), "string");
  std::string value(characters, length);
  check_code(torch_delete_string(handle), "string");
  return value;
}

// The functions of operators.h as the dispatcher calls them; those that take strings by handle.
namespace boxed {

using namespace anyflash;

Tensor fused_mlp(const Tensor& x, const Tensor& weight1, const OptionalTensor& bias1,
                 const Tensor& weight2, const OptionalTensor& bias2, StringHandle activation,
                 bool recompute) {
  return anyflash::fused_mlp(x, weight1, bias1, weight2, bias2, take(activation), recompute);
}

Tensor refuse_gradient(const Tensor& /*gradient*/, const std::vector<int64_t>& /*size*/,
                       StringHandle why) {
  raise_runtime_error(take(why));
}

}  // namespace boxed

std::string register_all() {
  const std::vector<const char*> cpu = {"CPU"};
  std::vector<const char*> everywhere, schemas;
  std::vector<Kernel> kernels;
#define DEVICE_KEY(key) everywhere.push_back(#key);
#define OPERATOR(group, where, name, schema) \
  schemas.push_back(#name schema);           \
  for (const char* key : where) kernels.push_back({key, #name, TORCH_BOX(&boxed::name)});
#include "schemas.def"
#undef OPERATOR
#undef DEVICE_KEY
  return register_operators("anyflash", schemas, kernels);
}

// A static object, not a constructor attribute: that would run before the string beside it exists.
// No exception may leave here.
struct Registration {
  std::string error;
  Registration() {
    try {
      error = register_all();
    } catch (const std::exception& problem) {
      error = problem.what();
    }
    if (error.empty()) return;
    anyflash_warn(
        text("anyflash: libanyflash_ops.so did not register its operators: ", error).c_str());
  }
};

const Registration registration;

}  // namespace
}  // namespace anyflash

// "" when all operators are registered, else the reason. Read by Python's loader and by C++
// programs.
extern "C" __attribute__((visibility("default"))) const char* anyflash_register_error(void) {
  return anyflash::registration.error.c_str();
}
