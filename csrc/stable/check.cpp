#include "stable/check.h"

#include "core/late_symbol.h"
#include "stable/dtypes.h"

namespace anyflash {

void raise_call_failed(const char* what) {
  std::string message = text("anyflash: ", what, " failed");
  static LateSymbol<const char*()> exception_text("torch_exception_get_what_without_backtrace");
  if (auto* get = exception_text.find()) message += text(": ", get());
  throw std::runtime_error(message);
}

std::string shape_text(const torch::stable::Tensor& tensor) {
  std::ostringstream stream;
  const int64_t rank = tensor.dim();
  stream << "(";
  for (int64_t i = 0; i < rank; ++i) stream << (i == 0 ? "" : ", ") << tensor.size(i);
  stream << (rank == 1 ? ",)" : ")");
  return stream.str();
}

std::string dtype_text(const torch::stable::Tensor& tensor) {
  const int32_t code = dtype_of(tensor);
  const DTypes& types = dtypes();
  if (code == types.fp16) return "fp16";
  if (code == types.bf16) return "bf16";
  if (code == types.fp32) return "fp32";
  if (code == types.fp64) return "fp64";
  if (code == types.int32) return "int32";
  if (code == types.int64) return "int64";
  if (code == types.boolean) return "bool";
  if (code == aoti_torch_dtype_uint8()) return "uint8";
  if (code == aoti_torch_dtype_int8()) return "int8";
  if (code == aoti_torch_dtype_int16()) return "int16";
  if (code == aoti_torch_dtype_complex64()) return "complex64";
  if (code == aoti_torch_dtype_complex128()) return "complex128";
  if (code == aoti_torch_dtype_float8_e4m3fn()) return "float8_e4m3fn";
  if (code == aoti_torch_dtype_float8_e5m2()) return "float8_e5m2";
  return text("dtype number ", code);
}

std::string device_text(const torch::stable::Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return text("cuda:", tensor.get_device_index());
  return "another device";
}

void check_same_device(const torch::stable::Tensor& reference, const char* reference_name,
                       const torch::stable::Tensor& tensor, const char* name) {
  int32_t type[2] = {}, index[2] = {};
  check_code(aoti_torch_get_device_type(reference.get(), &type[0]), "device type");
  check_code(aoti_torch_get_device_type(tensor.get(), &type[1]), "device type");
  check_code(aoti_torch_get_device_index(reference.get(), &index[0]), "device index");
  check_code(aoti_torch_get_device_index(tensor.get(), &index[1]), "device index");
  AF_CHECK(type[0] == type[1] && index[0] == index[1], name, " must be on ",
           reference.is_cuda() ? "CUDA" : "cpu", ": expected ", device_text(reference), " like ",
           reference_name, ", got ", device_text(tensor));
}

}  // namespace anyflash
