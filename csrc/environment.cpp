#include "environment.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace anyflash {
namespace {

bool is_set(const char* name) {
  const char* value = std::getenv(name);
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

}  // namespace

const Environment& environment() {
  static const Environment read{read_chain(), is_set("ANYFLASH_CHECK")};
  return read;
}

}  // namespace anyflash
