// Errors in the user's language: no file, no line, no call chain.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace anyflash {

// The parts written one after the other: text("got ", 3) is "got 3".
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

[[noreturn]] void raise_runtime_error(const std::string& message);
[[noreturn]] void raise_call_failed(const char* what);

// Shim calls return a code; the text behind it is fetched where libtorch (2.13 or newer) can tell
// it.
inline void check_code(AOTITorchError code, const char* what) {
  if (__builtin_expect(code != AOTI_TORCH_SUCCESS, 0)) raise_call_failed(what);
}

// "(2, 77, 8, 64)", "(12,)" and "()", as Python prints shapes.
std::string shape_text(const torch::stable::Tensor& tensor);
// "fp16", "bf16", "fp32", "fp64", "int32", ...
std::string dtype_text(const torch::stable::Tensor& tensor);
// "cpu", "cuda:0"
std::string device_text(const torch::stable::Tensor& tensor);

}  // namespace anyflash

// A broken contract of a tensor argument: RuntimeError in Python. The message parts are evaluated
// only when it is broken.
#define AF_CHECK(condition, ...)                                      \
  do {                                                                \
    if (__builtin_expect(!(condition), 0)) {                          \
      ::anyflash::raise_runtime_error(::anyflash::text(__VA_ARGS__)); \
    }                                                                 \
  } while (0)
