#include "core/problem_text.h"

#include <cstdlib>
#include <sstream>
#include <stdexcept>

#include "core/dispatch.h"
#include "core/names.h"
#include "core/text.h"
#include "kernels/arch.h"

namespace anyflash {
namespace {

constexpr Name<Direction> kDirections[] = {{"forward", Direction::forward},
                                           {"backward", Direction::backward}};

Features features_of(const std::string& names) {
  Features features = 0;
  std::istringstream list(names);
  for (std::string name; std::getline(list, name, ',');) {
    std::string known;
    Features found = 0;
    for (uint32_t i = 0; i < feature_number::count; ++i) {
      if (name == kFeatureTexts[i].name) found = 1u << i;
      known += (known.empty() ? "" : ", ") + std::string(kFeatureTexts[i].name);
    }
    if (found == 0) {
      throw std::invalid_argument(text("unknown feature '", name, "'; known: ", known));
    }
    features |= found;
  }
  return features;
}

int32_t number_of(const std::string& field, const std::string& value) {
  char* end = nullptr;
  const long number = std::strtol(value.c_str(), &end, 10);
  if (value.empty() || *end != '\0' || number != static_cast<int32_t>(number)) {
    throw std::invalid_argument(text("problem: ", field, " cannot be '", value, "'"));
  }
  return static_cast<int32_t>(number);
}

}  // namespace

Problem parse_problem(const std::string& lines) {
  Problem problem;
  int32_t isa = Isa::none;
  std::istringstream stream(lines);
  for (std::string line; std::getline(stream, line);) {
    const size_t sign = line.find('=');
    const std::string field = line.substr(0, sign);
    const std::string value = sign == std::string::npos ? "" : line.substr(sign + 1);
    if (field == "op") {
      problem.family = value_of("op", kFamilyNames, value);
    } else if (field == "device") {
      problem.device = value_of("device", kDeviceNames, value);
    } else if (field == "sm") {
      problem.sm = number_of(field, value);
    } else if (field == "driver") {
      problem.driver = number_of(field, value);
    } else if (field == "isa") {
      isa = parse_isa(value);
    } else if (field == "isa_lowered") {
      problem.isa_lowered = number_of(field, value) != 0;
    } else if (field == "direction") {
      problem.direction = value_of("direction", kDirections, value);
    } else if (field == "dtype") {
      problem.dtype = value_of("dtype", kDtypeNames, value);
    } else if (field == "head_dim") {
      problem.head_dim = number_of(field, value);
    } else if (field == "head_dim_v") {
      problem.head_dim_v = number_of(field, value);
    } else if (field == "features") {
      problem.features = features_of(value);
    } else if (field == "torch_version") {
      problem.torch_version = number_of(field, value);
    } else if (field == "order") {
      problem.order = parse_order(value);
    } else if (field == "explicit") {
      problem.explicit_order = number_of(field, value) != 0;
    } else {
      throw std::invalid_argument(text("problem: unknown field '", field, "'"));
    }
  }
  if (problem.device == Device::cpu) problem.sm = isa;
  return problem;
}

}  // namespace anyflash
