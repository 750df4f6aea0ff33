#include "core/environment.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/dispatch.h"
#include "kernels/arch.h"

namespace anyflash {
namespace {

// True for a variable that is neither empty nor 0.
bool is_set(const char* variable) {
  const char* value = std::getenv(variable);
  return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
}

Chain read_chain() {
  const char* names = std::getenv("ANYFLASH_BACKEND");
  Chain chain = kDefaultChain;
  if (names != nullptr && *names != '\0') {
    try {
      chain = parse_chain(names);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string("ANYFLASH_BACKEND: ") + error.what());
    }
  }
  return is_set("ANYFLASH_STRICT") ? strict(chain) : chain;
}

AllowedIsa read_cpu_isa() {
  const int32_t present = anyflash_cpu_isa();
  const char* name = std::getenv("ANYFLASH_CPU_ISA");
  if (name == nullptr || *name == '\0') return {present, false};
  try {
    const int32_t isa = parse_isa(name);
    if (contains(present, isa)) return {isa, isa != present};
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string("ANYFLASH_CPU_ISA: ") + error.what());
  }
  throw std::invalid_argument(std::string("ANYFLASH_CPU_ISA: this CPU does not have '") + name +
                              "'; it has " + isa_name(present));
}

}  // namespace

const Environment& environment() {
  static const Environment read{read_chain(), is_set("ANYFLASH_VERBOSE")};
  return read;
}

bool checks_values() {
  static const bool read = is_set("ANYFLASH_CHECK");
  return read;
}

AllowedIsa cpu_isa() {
  static const AllowedIsa read = read_cpu_isa();
  return read;
}

}  // namespace anyflash
