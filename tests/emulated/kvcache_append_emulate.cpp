// The kernel that appends to a cache, on the emulator: the cases of the CPU's kernel, with the
// threads of a block in three orders.
#include <memory>

#include "tests/cpp/kvcache_append_cases.h"
#include "tests/emulated/launch.h"

using namespace kvcache_append_cases;
using anyflash::emulated::kOrders;

namespace {

auto launcher(const char* dtype) {
  return [name = std::string("kvcache_append_forward_") + dtype + "_sm75"](
             const KvcacheAppendParams& p) { return anyflash::emulated::launch(name, &p); };
}

template <typename T>
void check_all(const char* dtype) {
  for (const Case& c : cases()) {
    std::unique_ptr<const Check<T>> first;
    for (const emu::Order order : kOrders) {
      CAPTURE(c.lengths, c.head_dim, c.rotary_dim, c.interleaved, c.page_size, c.gap, int(order));
      emu::options().order = order;
      auto check = std::make_unique<Check<T>>(c, launcher(dtype));
      check->compare();
      CHECK(emu::take_result().text() == "");
      if (!first) {
        first = std::move(check);
      } else {
        CHECK(check->same_bits(*first));
      }
    }
  }
}

// Elements that a thread moves at a time.
template <typename T>
int elements_at_once(const char* dtype, const Case& c) {
  emu::take_result();
  Check<T>(c, launcher(dtype)).compare();
  const std::vector<emu::Launch> launches = emu::take_result().launches;
  REQUIRE(launches.size() == 1);
  for (const int count : {1, 4, 8}) {  // a template argument in the mangled name
    if (launches[0].name.find("Li" + std::to_string(count) + "E") != std::string::npos)
      return count;
  }
  return 0;
}

}  // namespace

TEST_CASE("emulated kvcache_append: fp16") { check_all<fp16>("fp16"); }
TEST_CASE("emulated kvcache_append: bf16") { check_all<bf16>("bf16"); }
TEST_CASE("emulated kvcache_append: fp32") { check_all<fp32>("fp32"); }

TEST_CASE("emulated kvcache_append: more tokens than blocks") {
  Case c{{0}};
  c.seqlen_new = 8192 + 37;
  c.heads_k = 1;
  c.head_dim = c.head_dim_v = 3;
  c.page_size = c.seqlen_new + 1;
  Check<bf16>(c, launcher("bf16")).compare();
  CHECK(emu::take_result().text() == "");
}

TEST_CASE("emulated kvcache_append: 16 bytes at a time where alignment allows") {
  Case c{{5}};
  c.head_dim = c.head_dim_v = 64;
  CHECK(elements_at_once<fp16>("fp16", c) == 8);
  c.gap = 4;
  CHECK(elements_at_once<fp16>("fp16", c) == 1);
  CHECK(elements_at_once<fp32>("fp32", c) == 4);
  c.gap = 0;
  c.head_dim = 60;
  CHECK(elements_at_once<bf16>("bf16", c) == 1);

  c.head_dim = 64;
  c.rotary_dim = 24;
  CHECK(elements_at_once<fp16>("fp16", c) == 8);
  c.interleaved = false;  // 12 columns apart
  CHECK(elements_at_once<fp16>("fp16", c) == 1);
  CHECK(elements_at_once<fp32>("fp32", c) == 4);
}

TEST_CASE("emulated kvcache_append: what cannot be computed is an error") {
  const auto launch = launcher("fp32");
  const float angle = 0;
  KvcacheAppendParams p{};
  p.head_dim = p.head_dim_v = 8;
  CHECK(launch(p) == 0);  // no token
  p.batch = p.seqlen_new = 1;
  CHECK(launch(p) == anyflash::kErrorInvalidParams);  // pages without rows
  p.page_size = 1;
  p.rotary_cos = p.rotary_sin = &angle;
  CHECK(launch(p) == anyflash::kErrorInvalidParams);  // a rotary table without rows
}
