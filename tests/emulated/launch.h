// How tests launch an instance on the emulator.
#pragma once

#include <string>

#include "emulator/runtime/emulator.h"
#include "kernels/launch.h"
#include "tests/cpp/catch.h"

namespace anyflash::emulated {

constexpr emu::Order kOrders[] = {emu::Order::forward, emu::Order::reverse, emu::Order::random};

inline int32_t launch(const std::string& instance_name, const void* params) {
  const Instance* instance = anyflash_find_instance(instance_name.c_str());
  REQUIRE(instance != nullptr);
  return anyflash_launch(instance, params, nullptr);
}

}  // namespace anyflash::emulated
