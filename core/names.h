// The names of families and dtypes, as messages and tools write them.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#include "kernels/launch.h"

namespace anyflash {

template <typename Value>
struct Name {
  const char* name;
  Value value;
};

constexpr Name<Family> kFamilyNames[] = {{"attention", Family::attention},
                                         {"bias_activation", Family::bias_activation},
                                         {"kvcache_append", Family::kvcache_append},
                                         {"rotary", Family::rotary},
                                         {"norm", Family::norm},
                                         {"cross_entropy", Family::cross_entropy}};
constexpr Name<Dtype> kDtypeNames[] = {
    {"fp16", Dtype::fp16}, {"bf16", Dtype::bf16}, {"fp32", Dtype::fp32}, {"fp64", Dtype::fp64}};

template <typename Value, size_t kCount>
constexpr const char* name_of(Value value, const Name<Value> (&names)[kCount],
                              const char* otherwise) {
  for (const Name<Value>& entry : names) {
    if (entry.value == value) return entry.name;
  }
  return otherwise;
}

// Throws std::invalid_argument: `unknown dtype 'int8'; known: fp16, bf16, ...`.
template <typename Entry, size_t kCount>
auto value_of(const char* what, const Entry (&names)[kCount], const std::string& name) {
  std::string known;
  for (const Entry& entry : names) {
    if (name == entry.name) return entry.value;
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  throw std::invalid_argument(std::string("unknown ") + what + " '" + name + "'; known: " + known);
}

}  // namespace anyflash
