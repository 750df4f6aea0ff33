// Runs kernels/cpu/kvcache_append.h, every instance of this build that this CPU has, against a
// float64 reference.
#include "cpu_instances.h"
#include "kvcache_append_cases.h"

using namespace kvcache_append_cases;
using anyflash::CpuThreads;
using anyflash::Direction;
using anyflash::Dtype;
using anyflash::Family;
using anyflash::Instance;

namespace {

template <typename T>
void check_all(Dtype dtype) {
  const CpuThreads threads{&parallel_for, 4};
  for (const char* arch : cpu_archs(Family::kvcache_append)) {
    const Instance* instance =
        cpu_instance(Family::kvcache_append, Direction::forward, dtype, arch);
    REQUIRE(instance != nullptr);
    for (const Case& c : cases()) {
      CAPTURE(arch, c.lengths, c.head_dim, c.rotary_dim, c.interleaved, c.page_size, c.gap);
      const auto launch_on = [&](const CpuThreads* where) {
        return [=](const KvcacheAppendParams& p) {
          return anyflash_launch(instance, &p, const_cast<CpuThreads*>(where));
        };
      };
      Check<T> check(c, launch_on(nullptr));
      check.compare();
      CHECK(check.same_bits(Check<T>(c, launch_on(&threads))));
    }
  }
}

}  // namespace

TEST_CASE("cpu kvcache_append: fp16", "[cpu]") { check_all<fp16>(Dtype::fp16); }
TEST_CASE("cpu kvcache_append: bf16", "[cpu]") { check_all<bf16>(Dtype::bf16); }
TEST_CASE("cpu kvcache_append: fp32", "[cpu]") { check_all<fp32>(Dtype::fp32); }

TEST_CASE("cpu kvcache_append: a rotary table without rows is an error", "[cpu]") {
  for (const char* arch : cpu_archs(Family::kvcache_append)) {
    const float angle = 0;
    KvcacheAppendParams p{};
    p.rotary_cos = p.rotary_sin = &angle;
    p.batch = p.seqlen_new = 1;
    const Instance* instance =
        cpu_instance(Family::kvcache_append, Direction::forward, Dtype::fp32, arch);
    CHECK(anyflash_launch(instance, &p, nullptr) == anyflash::kErrorInvalidParams);
  }
}
