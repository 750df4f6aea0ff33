// Errors in the user's language: no file, no line, no call chain.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "core/tensor_view.h"

namespace anyflash {

// The parts written one after the other: text("got ", 3) is "got 3".
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

[[noreturn]] inline void raise_runtime_error(const std::string& message) {
  throw std::runtime_error(message);
}

// "(2, 77, 8, 64)", "(12,)" and "()", as Python prints shapes.
std::string shape_text(const TensorView& tensor);
// "fp16", "bf16", "fp32", "fp64", "int32", ...
const char* dtype_name(ElementType type);
const char* dtype_text(const TensorView& tensor);
// "cpu", "cuda:0"
std::string device_text(const TensorView& tensor);

}  // namespace anyflash

// A broken contract of an argument: RuntimeError in Python. The message parts are evaluated only
// when it is broken.
#define AF_CHECK(condition, ...)                                      \
  do {                                                                \
    if (__builtin_expect(!(condition), 0)) {                          \
      ::anyflash::raise_runtime_error(::anyflash::text(__VA_ARGS__)); \
    }                                                                 \
  } while (0)
