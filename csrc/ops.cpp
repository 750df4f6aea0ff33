// Registers every operator of schemas.def when the library is loaded.
#include <torch/csrc/stable/library.h>

#include "operators.h"
#include "stable/check.h"
#include "stable/registrar.h"

namespace anyflash {
namespace {

// The one operator with a string argument, unboxed here: the headers' conversion leaks what it
// returns.
Tensor fused_mlp_by_handle(const Tensor& x, const Tensor& weight1, const OptionalTensor& bias1,
                           const Tensor& weight2, const OptionalTensor& bias2,
                           StringHandle activation, bool recompute) {
  const char* characters = nullptr;
  size_t length = 0;
  check_code(torch_string_length(activation, &length), "string");
  check_code(torch_string_c_str(activation, &characters), "string");
  const std::string name(characters, length);
  check_code(torch_delete_string(activation), "string");
  return fused_mlp(x, weight1, bias1, weight2, bias2, name, recompute);
}

std::string register_all() {
  const std::vector<const char*> schemas = {
#define OPERATOR(group, schema) schema,
#include "schemas.def"
#undef OPERATOR
  };
  // The same function on both devices: what runs where is decided inside.
  std::vector<Kernel> kernels;
  for (const char* key : {"CPU", "CUDA"}) {
    kernels.insert(
        kernels.end(),
        {{key, "attention_forward", TORCH_BOX(&attention_forward)},
         {key, "attention_backward", TORCH_BOX(&attention_backward)},
         {key, "attention_kvcache_", TORCH_BOX(&attention_kvcache_)},
         {key, "bias_activation", TORCH_BOX(&bias_activation)},
         {key, "bias_activation_backward", TORCH_BOX(&bias_activation_backward)},
         {key, "fused_mlp_forward", TORCH_BOX(&fused_mlp_forward)},
         {key, "fused_mlp_backward", TORCH_BOX(&fused_mlp_backward)},
         {key, "flash_attn_func", TORCH_BOX(&flash_attn_func)},
         {key, "flash_attn_kvpacked_func", TORCH_BOX(&flash_attn_kvpacked_func)},
         {key, "flash_attn_qkvpacked_func", TORCH_BOX(&flash_attn_qkvpacked_func)},
         {key, "flash_attn_varlen_func", TORCH_BOX(&flash_attn_varlen_func)},
         {key, "flash_attn_varlen_kvpacked_func", TORCH_BOX(&flash_attn_varlen_kvpacked_func)},
         {key, "flash_attn_varlen_qkvpacked_func", TORCH_BOX(&flash_attn_varlen_qkvpacked_func)},
         {key, "flash_attn_with_kvcache", TORCH_BOX(&flash_attn_with_kvcache)},
         {key, "fused_mlp", TORCH_BOX(&fused_mlp_by_handle)}});
  }
  // Those of rowwise.h. Their kernels on other keys come from Python.
  kernels.insert(kernels.end(), {});
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
