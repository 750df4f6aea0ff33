// anyflash._native: what is built, the decision, and the shared definitions (dropout bits, masks)
// as Python sees them. No torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "environment.h"
#include "kernels/arch.h"
#include "kernels/masks.h"
#include "kernels/philox.h"

namespace py = pybind11;

namespace anyflash {
namespace {

template <typename Value>
struct Name {
  const char* name;
  Value value;
};

constexpr Name<Family> kFamilies[] = {{"attention", Family::attention},
                                      {"bias_activation", Family::bias_activation},
                                      {"kvcache_append", Family::kvcache_append},
                                      {"rotary", Family::rotary},
                                      {"norm", Family::norm},
                                      {"cross_entropy", Family::cross_entropy}};
constexpr Name<Direction> kDirections[] = {{"forward", Direction::forward},
                                           {"backward", Direction::backward}};
constexpr Name<Device> kDevices[] = {{"cpu", Device::cpu}, {"cuda", Device::cuda}};
constexpr Name<Dtype> kDtypes[] = {
    {"fp16", Dtype::fp16}, {"bf16", Dtype::bf16}, {"fp32", Dtype::fp32}, {"fp64", Dtype::fp64}};
template <typename Value, size_t kCount>
Value value_of(const char* what, const Name<Value> (&names)[kCount], const std::string& name) {
  std::string known;
  for (const auto& entry : names) {
    if (name == entry.name) return entry.value;
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  throw py::value_error("unknown " + std::string(what) + " '" + name + "'; known: " + known);
}

template <typename Value, size_t kCount>
const char* name_of(const Name<Value> (&names)[kCount], Value value) {
  for (const auto& entry : names) {
    if (entry.value == value) return entry.name;
  }
  return "";
}

Features feature_of(const std::string& name) {
  std::string known;
  for (uint32_t i = 0; i < feature_number::count; ++i) {
    if (name == kFeatureTexts[i].name) return 1u << i;
    known += (known.empty() ? "" : ", ") + std::string(kFeatureTexts[i].name);
  }
  throw py::value_error("unknown feature '" + name + "'; known: " + known);
}

std::string join(const std::vector<std::string>& names) {
  std::string joined;
  for (const std::string& name : names) joined += (joined.empty() ? "" : ",") + name;
  return joined;
}

void set_field(Problem& problem, int32_t& isa, const std::string& field, const py::handle& value) {
  if (field == "op") {
    problem.family = value_of("op", kFamilies, value.cast<std::string>());
  } else if (field == "device") {
    problem.device = value_of("device", kDevices, value.cast<std::string>());
  } else if (field == "sm") {
    problem.sm = value.cast<int32_t>();
  } else if (field == "isa") {
    isa = parse_isa(value.cast<std::string>());
  } else if (field == "direction") {
    problem.direction = value_of("direction", kDirections, value.cast<std::string>());
  } else if (field == "dtype") {
    problem.dtype = value_of("dtype", kDtypes, value.cast<std::string>());
  } else if (field == "head_dim") {
    problem.head_dim = value.cast<int32_t>();
  } else if (field == "head_dim_v") {
    problem.head_dim_v = value.cast<int32_t>();
  } else if (field == "features") {
    for (const py::handle feature : value) {
      problem.features |= feature_of(feature.cast<std::string>());
    }
  } else if (field == "torch_version") {
    problem.torch_version = value.cast<int32_t>();
  } else if (field == "chain") {
    problem.chain =
        parse_chain(py::isinstance<py::str>(value) ? value.cast<std::string>()
                                                   : join(value.cast<std::vector<std::string>>()));
  } else if (field == "explicit") {
    problem.explicit_chain = value.cast<bool>();
  } else {
    throw py::value_error("problem: unknown field '" + field + "'");
  }
}

Problem problem_from(const py::dict& fields) {
  Problem problem;
  int32_t isa = Isa::none;
  for (const auto& [key, value] : fields) {
    const auto field = py::str(key).cast<std::string>();
    try {
      set_field(problem, isa, field, value);
    } catch (const py::cast_error&) {
      throw py::type_error("problem: " + field + " cannot be " +
                           py::repr(value).cast<std::string>());
    }
  }
  if (problem.device == Device::cpu) problem.sm = isa;
  return problem;
}

py::dict decide_dict(const py::dict& fields) {
  const Problem problem = problem_from(fields);
  const Decision decision = decide(problem);
  py::list reasons;
  for (const Reason& reason : decision.reasons)
    reasons.append(py::make_tuple(route_name(reason.route), reason.text));
  py::dict result;
  result["route"] = route_name(decision.choice.route);
  result["instance"] = decision.choice.instance
                           ? py::object(py::str(decision.choice.instance->name))
                           : py::object(py::none());
  const auto speed =
      decision.choice.instance ? measured(*decision.choice.instance, problem) : std::nullopt;
  result["measured"] =
      speed
          ? py::object(py::dict(py::arg("worst") = speed->worst, py::arg("median") = speed->median))
          : py::object(py::none());
  result["reasons"] = reasons;
  if (decision.choice.route == Route::none) result["refusal"] = refusal(problem, decision);
  return result;
}

std::vector<std::string> feature_names(Features features) {
  std::vector<std::string> names;
  for (uint32_t i = 0; i < feature_number::count; ++i) {
    if (features >> i & 1) names.push_back(kFeatureTexts[i].name);
  }
  return names;
}

py::list instances() {
  py::list rows;
  const InstanceTable table = built_instances();
  for (int32_t i = 0; i < table.count; ++i) {
    const Instance& instance = table.instances[i];
    py::dict row;
    row["name"] = instance.name;
    row["family"] = name_of(kFamilies, instance.family);
    row["device"] = name_of(kDevices, instance.device);
    row["arch"] = instance.arch;
    row["min_sm"] = instance.min_sm;
    row["max_sm"] = instance.max_sm;
    row["direction"] = name_of(kDirections, instance.direction);
    row["dtype"] = name_of(kDtypes, instance.dtype);
    row["max_head_dim"] = instance.max_head_dim;
    row["head_dim_multiple"] = instance.head_dim_multiple;
    row["features"] = feature_names(instance.features);
    row["checked_on"] = instance.checked_on;
    rows.append(row);
  }
  return rows;
}

// The rows of routes.def; lists as written there, joined by '|'.
py::list routes() {
  py::list rows;
#define ROUTE(name, chain, device, min_sm, dtypes, max_head_dim, multiple, min_torch, forward,    \
              backward)                                                                           \
  rows.append(py::dict(py::arg("name") = #name, py::arg("chain") = #chain,                        \
                       py::arg("device") = #device, py::arg("min_sm") = min_sm,                   \
                       py::arg("dtypes") = #dtypes, py::arg("max_head_dim") = max_head_dim,       \
                       py::arg("head_dim_multiple") = multiple, py::arg("min_torch") = min_torch, \
                       py::arg("forward") = #forward, py::arg("backward") = #backward));
#include "routes.def"
#undef ROUTE
  return rows;
}

py::dict build_info() {
  py::dict info;
  info["version"] = ANYFLASH_VERSION;
  info["cuda_version"] = anyflash_build_cuda_version();
  info["archs"] = anyflash_build_archs();
  info["compiler"] = __VERSION__;
  return info;
}

// One byte per element of (rows, cols), 1 = kept.
py::bytes dropout_keep(int64_t seed, int64_t offset, uint32_t bh, uint32_t rows, uint32_t cols,
                       double dropout_p) {
  const Dropout dropout{uint64_t(seed), uint32_t(offset), Dropout::threshold_for(dropout_p)};
  std::string kept;
  kept.reserve(size_t(rows) * cols);
  for (uint32_t row = 0; row < rows; ++row) {
    for (uint32_t col = 0; col < cols; ++col) kept.push_back(dropout.keeps(bh, row, col) ? 1 : 0);
  }
  return kept;
}

// (kv_begin, kv_end) per query row.
std::vector<std::pair<int64_t, int64_t>> kv_ranges(int64_t seqlen_q, int64_t seqlen_k,
                                                   int64_t window_left, int64_t window_right) {
  const IntervalMask<int64_t> mask{seqlen_q, seqlen_k, window_left, window_right};
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (int64_t row = 0; row < seqlen_q; ++row)
    ranges.emplace_back(mask.kv_begin(row), mask.kv_end(row));
  return ranges;
}

}  // namespace
}  // namespace anyflash

PYBIND11_MODULE(_native, m) {
  using namespace anyflash;
  m.doc() = "What anyflash's binary knows without torch.";
  m.def("instances", &instances,
        "The compiled kernels, a dict for each line of instances.def that is in this build.");
  m.def("routes", &routes, "The rows of routes.def.");
  m.def("decide", &decide_dict, py::arg("problem"),
        "The route for a problem: {'route', 'instance', 'measured', 'reasons': [(route, text), "
        "...]}, and 'refusal' if there is none.");
  m.def(
      "cpu_isa", [] { return isa_name(cpu_isa()); },
      "The instruction set that CPU kernels may use: this machine's, or ANYFLASH_CPU_ISA.");
  m.def("build_info", &build_info, "Versions this module was built with.");
  m.def("parse_chain", &parse_chain, py::arg("names"), "'kernel,sdpa,math' -> 0x321.");
  m.def("dropout_keep", &dropout_keep, py::arg("seed"), py::arg("offset"), py::arg("bh"),
        py::arg("rows"), py::arg("cols"), py::arg("dropout_p"),
        "One byte per element of (rows, cols), 1 = kept.");
  m.def("kv_ranges", &kv_ranges, py::arg("seqlen_q"), py::arg("seqlen_k"), py::arg("window_left"),
        py::arg("window_right"), "(kv_begin, kv_end) per query row.");
}
