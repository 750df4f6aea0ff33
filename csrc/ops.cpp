// Registers every operator of schemas.def when the library is loaded.
#include <torch/csrc/stable/library.h>

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

Tensor fused_mlp_by_handle(const Tensor& x, const Tensor& weight1, const OptionalTensor& bias1,
                           const Tensor& weight2, const OptionalTensor& bias2,
                           StringHandle activation, bool recompute) {
  return fused_mlp(x, weight1, bias1, weight2, bias2, take(activation), recompute);
}

Tensor refuse_gradient(const Tensor& /*gradient*/, const std::vector<int64_t>& /*size*/,
                       StringHandle why) {
  raise_runtime_error(take(why));
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
        {{key, "_flash_attn_forward", TORCH_BOX(&_flash_attn_forward)},
         {key, "_flash_attn_backward", TORCH_BOX(&_flash_attn_backward)},
         {key, "_flash_attn_kvcache_", TORCH_BOX(&_flash_attn_kvcache_)},
         {key, "_bias_activation_forward", TORCH_BOX(&_bias_activation_forward)},
         {key, "_bias_activation_backward", TORCH_BOX(&_bias_activation_backward)},
         {key, "_fused_mlp_forward", TORCH_BOX(&_fused_mlp_forward)},
         {key, "_fused_mlp_backward", TORCH_BOX(&_fused_mlp_backward)},
         {key, "refuse_gradient", TORCH_BOX(&refuse_gradient)},
         {key, "flash_attn_func", TORCH_BOX(&flash_attn_func)},
         {key, "flash_attn_kvpacked_func", TORCH_BOX(&flash_attn_kvpacked_func)},
         {key, "flash_attn_qkvpacked_func", TORCH_BOX(&flash_attn_qkvpacked_func)},
         {key, "flash_attn_varlen_func", TORCH_BOX(&flash_attn_varlen_func)},
         {key, "flash_attn_varlen_kvpacked_func", TORCH_BOX(&flash_attn_varlen_kvpacked_func)},
         {key, "flash_attn_varlen_qkvpacked_func", TORCH_BOX(&flash_attn_varlen_qkvpacked_func)},
         {key, "flash_attn_with_kvcache", TORCH_BOX(&flash_attn_with_kvcache)},
         {key, "fused_mlp", TORCH_BOX(&fused_mlp_by_handle)}});
  }
  // Kernels on the CPU alone. On other keys, and for dtypes without a kernel, Python's math stands
  // (anyflash/_operators): the public functions never bring such a tensor here.
  kernels.insert(kernels.end(),
                 {{"CPU", "rotary", TORCH_BOX(&rotary)},
                  {"CPU", "rotary_", TORCH_BOX(&rotary_)},
                  {"CPU", "cross_entropy_forward", TORCH_BOX(&cross_entropy_forward)},
                  {"CPU", "cross_entropy_backward", TORCH_BOX(&cross_entropy_backward)},
                  {"CPU", "cross_entropy_backward_", TORCH_BOX(&cross_entropy_backward_)},
                  {"CPU", "norm_forward", TORCH_BOX(&norm_forward)},
                  {"CPU", "norm_backward", TORCH_BOX(&norm_backward)}});
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
