// Executes kernels/elementwise/kvcache_append.cuh, launcher included, on the CPU (simt.h) against a
// float64 reference.
#include "kernels/elementwise/kvcache_append.cuh"
#include "kvcache_append_cases.h"

using namespace kvcache_append_cases;
namespace kvcache_append = anyflash::kvcache_append;

namespace {

template <typename T>
int32_t launch(const KvcacheAppendParams& p) {
  return kvcache_append::launch<T>(p, nullptr);
}

template <typename T>
void check_all() {
  for (const Case& c : cases()) {
    CAPTURE(c.lengths, c.head_dim, c.rotary_dim, c.interleaved, c.page_size, c.gap);
    Check<T> check(c, launch<T>);
    check.compare();
    simt::reverse_order = true;
    const Check<T> reversed(c, launch<T>);
    simt::reverse_order = false;
    CHECK(check.same_bits(reversed));
  }
}

KvcacheAppendParams aligned_params(int64_t head_dim) {
  KvcacheAppendParams p{};
  p.head_dim = p.head_dim_v = head_dim;
  return p;
}

}  // namespace

TEST_CASE("kvcache_append: fp16 on the CPU", "[kvcache_append]") { check_all<fp16>(); }
TEST_CASE("kvcache_append: bf16 on the CPU", "[kvcache_append]") { check_all<bf16>(); }
TEST_CASE("kvcache_append: fp32 on the CPU", "[kvcache_append]") { check_all<fp32>(); }

TEST_CASE("kvcache_append: more tokens than blocks", "[kvcache_append]") {
  Case c{{0}};
  c.seqlen_new = 8192 + 37;
  c.heads_k = 1;
  c.head_dim = c.head_dim_v = 3;
  c.page_size = c.seqlen_new + 1;
  Check<bf16>(c, launch<bf16>).compare();
}

TEST_CASE("kvcache_append: 16 bytes at a time where alignment allows", "[kvcache_append]") {
  KvcacheAppendParams p = aligned_params(64);
  CHECK(kvcache_append::vectorised<fp16>(p));
  p.k_cache.row_stride = 12;
  CHECK_FALSE(kvcache_append::vectorised<fp16>(p));
  CHECK(kvcache_append::vectorised<fp32>(p));
  p = aligned_params(64);
  alignas(16) uint16_t memory[2] = {};
  p.v.data = &memory[1];
  CHECK_FALSE(kvcache_append::vectorised<bf16>(p));
  CHECK_FALSE(kvcache_append::vectorised<bf16>(aligned_params(60)));

  p = aligned_params(64);
  p.rotary_cos = memory;
  p.rotary_dim = 24;
  p.interleaved = true;
  CHECK(kvcache_append::vectorised<fp16>(p));
  p.interleaved = false;  // 12 columns apart
  CHECK_FALSE(kvcache_append::vectorised<fp16>(p));
  CHECK(kvcache_append::vectorised<fp32>(p));
}

TEST_CASE("kvcache_append: what cannot be computed is an error", "[kvcache_append]") {
  const float angle = 0;
  KvcacheAppendParams p = aligned_params(8);
  CHECK(launch<fp32>(p) == 0);  // no token
  p.batch = p.seqlen_new = 1;
  CHECK(launch<fp32>(p) == anyflash::kErrorInvalidParams);  // pages without rows
  p.page_size = 1;
  p.rotary_cos = p.rotary_sin = &angle;
  CHECK(launch<fp32>(p) == anyflash::kErrorInvalidParams);  // a rotary table without rows
}
