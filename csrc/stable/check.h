// Errors in the user's language: no file, no line, no call chain.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "core/text.h"

namespace anyflash {

[[noreturn]] void raise_call_failed(const char* what);

// Shim calls return a code; the text behind it is fetched where libtorch (2.13 or newer) can tell
// it.
inline void check_code(AOTITorchError code, const char* what) {
  if (__builtin_expect(code != AOTI_TORCH_SUCCESS, 0)) raise_call_failed(what);
}

}  // namespace anyflash
