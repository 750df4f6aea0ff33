// Every line of instruction_cases.def: one thread's instructions, through PTX and the translator.
#include <cstring>
#include <string>
#include <vector>

#include "emulator/runtime/emulator.h"
#include "tests/cpp/catch.h"

namespace {

struct Case {
  int line;
  const char* code;
  std::string types;              // of the result and of the operands
  std::vector<uint64_t> numbers;  // operands, expected result
};

uint64_t f32(float x) { return emu::float_bits(x); }

uint64_t f64(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}

const std::vector<Case>& cases() {
  static const std::vector<Case> list = {
#define CASE(code, types, ...) {__LINE__, code, types, {__VA_ARGS__}},
#include "emulator/tests/instruction_cases.def"
#undef CASE
  };
  return list;
}

}  // namespace

TEST_CASE("instructions of one lane") {
  emu::Buffer<uint64_t> out(1);
  for (size_t i = 0; i < cases().size(); ++i) {
    Case c = cases()[i];
    INFO("instruction_cases.def:" << c.line << ": " << c.code);
    const uint64_t expected = c.numbers.back();
    out[0] = 0;
    uint64_t* target = out.data();
    std::vector<void*> arguments = {&target};
    for (size_t k = 0; k + 1 < c.numbers.size(); ++k) arguments.push_back(&c.numbers[k]);
    const std::string name = "case_" + std::to_string(i);
    REQUIRE(emu::launch_registered(name.c_str(), {1}, {32}, 0, arguments.data()));
    CHECK(out[0] == expected);
    CHECK(emu::take_result().text().empty());
  }
}
