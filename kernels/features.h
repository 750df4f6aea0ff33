// Features as bits: Feature::causal is one, Features a set of them.
#pragma once

#include "kernels/portable.h"

namespace anyflash {

using Features = uint32_t;

namespace feature_number {
enum : uint32_t {
#define FEATURE(name, phrase) name,
#define FEATURE_SET(name, features)
#include "kernels/features.def"
#undef FEATURE_SET
#undef FEATURE
  count
};
}  // namespace feature_number

namespace Feature {
#define FEATURE(name, phrase) constexpr Features name = 1u << feature_number::name;
#define FEATURE_SET(name, features) constexpr Features name = features;
#include "kernels/features.def"
#undef FEATURE_SET
#undef FEATURE
}  // namespace Feature

struct FeatureText {
  const char* name;
  const char* phrase;  // how a reason names it
};

// By feature_number.
constexpr FeatureText kFeatureTexts[] = {
#define FEATURE(name, phrase) {#name, phrase},
#define FEATURE_SET(name, features)
#include "kernels/features.def"
#undef FEATURE_SET
#undef FEATURE
};

}  // namespace anyflash
