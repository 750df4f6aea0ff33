#include "stable/check.h"

#include "core/late_symbol.h"

namespace anyflash {

void raise_call_failed(const char* what) {
  std::string message = text("anyflash: ", what, " failed");
  static LateSymbol<const char*()> exception_text("torch_exception_get_what_without_backtrace");
  if (auto* get = exception_text.find()) message += text(": ", get());
  throw std::runtime_error(message);
}

}  // namespace anyflash
