// Every kind of mistake is reported as what it is, at its line, in every order of threads; and the
// same code done right is not.
#include "emulator/tests/run_kernel.h"

namespace {

constexpr emu::Order kOrders[] = {emu::Order::forward, emu::Order::reverse, emu::Order::random};

struct Wrong {
  const char* kernel;
  const char* kind;  // of the report; null for none
  uint32_t threads = 64;
  uint32_t blocks = 1;
  uint32_t argument = 0;  // in[0]
};

// Prints as itself when a check fails.
std::string reports(const Wrong& w, emu::Order order, emu::Result* result = nullptr) {
  emu::options() = {};
  emu::options().order = order;
  emu::options().compute_capability = 90;
  Words in(1024), out(1024);
  in[0] = w.argument;
  emu::Result got = run_reported(w.kernel, in, out, w.threads, w.blocks, 8192);
  emu::options() = {};
  std::string kinds;
  for (const emu::Report& report : got.reports) kinds += report.kind + " at " + report.where + "; ";
  if (result) *result = got;
  return kinds;
}

void check(const std::vector<Wrong>& list) {
  for (const Wrong& w : list) {
    for (const emu::Order order : kOrders) {
      INFO(w.kernel << ", order " << int(order));
      emu::Result result;
      const std::string kinds = reports(w, order, &result);
      if (!w.kind) {
        CHECK(kinds == "");
        continue;
      }
      INFO(kinds);
      CHECK(result.has(w.kind));
      for (const emu::Report& report : result.reports) {
        if (report.kind != w.kind) continue;
        CHECK(report.count > 0);
        CHECK(report.kernel == w.kernel);
      }
    }
  }
}

}  // namespace

TEST_CASE("races in shared memory") {
  check({{"exchange_fine", nullptr},
         {"read_before_barrier", "race-RAW"},
         {"write_after_read", "race-WAR"},
         {"write_twice", "race-WW"},
         {"warp_exchange_fine", nullptr},
         {"warp_exchange", "race-RAW"},
         {"copy_without_barrier", "race-RAW"}});
}

TEST_CASE("races in global memory") {
  check({{"global_exchange", "global-race"},
         {"global_exchange_fine", nullptr},
         {"blocks_write_same", "global-race", 64, 2},
         {"blocks_write_own_fine", nullptr, 64, 4},
         {"blocks_read_others", "global-race", 64, 2},
         {"blocks_add_fine", nullptr, 64, 4}});
}

TEST_CASE("uninitialised, out of bounds, misaligned") {
  check({{"never_written", "uninitialised"},
         {"beyond_shared", "out-of-bounds", 64, 1, 2048},
         {"beyond_global", "out-of-bounds", 32, 1, 1024},
         {"misaligned_shared", "misaligned", 32},
         {"misaligned_ldmatrix", "misaligned", 32},
         {"misaligned_global", "misaligned", 32}});
}

TEST_CASE("asynchronous copies") {
  check({{"copy_fine", nullptr},
         {"copy_not_waited_for", "in-flight"},
         {"copy_left_at_exit", "in-flight"},
         {"load_fine", nullptr},
         {"load_not_waited_for", "in-flight"},
         {"store_fine", nullptr},
         {"store_without_fence", "proxy-fence"},
         {"store_overwritten", "in-flight"},
         {"store_left_at_exit", "in-flight"}});
}

TEST_CASE("divergence, barriers, deadlocks") {
  check({{"mask_without_caller", "divergence", 32},
         {"half_a_block_at_barrier", "deadlock"},
         {"two_counts", "barrier"},
         {"bad_barrier", "barrier", 64, 1, 33},
         {"too_many_bytes_expected", "deadlock"},
         {"barrier_without_init", "mbarrier"},
         {"too_many_arrivals", "mbarrier"}});
  Words in(32), out(32);
  in[3] = 1;  // one lane stays away
  CHECK(run_reported("half_a_warp_in_mma", in, out).has("divergence"));
}

TEST_CASE("wgmma mistakes") {
  check({{"wgmma_fine", nullptr, 128},
         {"wgmma_without_fence", "wgmma-fence", 128},
         {"wgmma_not_committed", "wgmma", 128},
         {"wgmma_not_waited_for", "in-flight", 128},
         {"wgmma_operand_overwritten", "in-flight", 128},
         {"wgmma_without_proxy_fence", "proxy-fence", 128},
         {"too_many_registers", "setmaxnreg", 512}});
}

TEST_CASE("launches that a GPU refuses") {
  Words in(1), out(64);
  CHECK(run_reported("exchange_fine", in, out, 2048).has("launch"));
  CHECK(run_reported("exchange_fine", in, out, 64, 1, 300 * 1024).has("launch"));
}

TEST_CASE("a report names the kernel's line") {
  emu::Result result;
  reports({"never_written", "uninitialised"}, emu::Order::forward, &result);
  REQUIRE(result.reports.size() == 1);
  CHECK(result.reports[0].where.find("wrong_kernels.cu:") != std::string::npos);
  CHECK(result.reports[0].count == 64);
}

TEST_CASE("bank conflicts") {
  struct Case {
    uint32_t distance;  // bytes between rows of 16
    uint32_t wavefronts;
  };
  for (const Case c : {Case{16, 4}, Case{32, 8}, Case{128, 32}, Case{80, 4}, Case{0, 4}}) {
    Words in(1, c.distance), out(32);
    const emu::Stats stats = run_reported("rows_apart", in, out, 32, 1, 4096).stats;
    INFO("distance " << c.distance);
    CHECK(stats.ldmatrix_ideal == 4);
    CHECK(stats.ldmatrix_wavefronts == c.wavefronts);
  }
  for (const Case c : {Case{1, 1}, Case{2, 2}, Case{32, 32}, Case{33, 1}}) {  // in words
    Words in(1, c.distance), out(32);
    const emu::Stats stats = run_reported("words_apart", in, out, 32, 1, 8192).stats;
    INFO("distance " << c.distance);
    CHECK(stats.shared_wavefronts == c.wavefronts);
  }
}
