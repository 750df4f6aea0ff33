// The kernel that appends to a cache, on the emulator: the cases of its other tests, with the
// threads of a block in three orders.
#include "emulator/runtime/emulator.h"
#include "kernels/launch.h"
#include "tests/cpp/kvcache_append_cases.h"

using namespace kvcache_append_cases;

namespace {

template <typename T>
void check_all(const char* name) {
  const anyflash::Instance* instance = anyflash_find_instance(name);
  REQUIRE(instance != nullptr);
  const auto launch = [&](const KvcacheAppendParams& p) {
    return anyflash_launch(instance, &p, nullptr);
  };
  for (const Case& c : cases()) {
    for (const emu::Order order : {emu::Order::forward, emu::Order::reverse, emu::Order::random}) {
      CAPTURE(c.lengths, c.head_dim, c.rotary_dim, c.interleaved, c.page_size, c.gap, int(order));
      emu::options().order = order;
      Check<T>(c, launch).compare();
      CHECK(emu::take_result().text() == "");
    }
  }
}

}  // namespace

TEST_CASE("emulated kvcache_append: fp16") { check_all<fp16>("kvcache_append_forward_fp16_sm75"); }
TEST_CASE("emulated kvcache_append: bf16") { check_all<bf16>("kvcache_append_forward_bf16_sm75"); }
TEST_CASE("emulated kvcache_append: fp32") { check_all<fp32>("kvcache_append_forward_fp32_sm75"); }
