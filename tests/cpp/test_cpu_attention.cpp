// The reference that the fuzz test judges by, and what a fuzz over single calls does not see:
// callers at once, errors of a parallel-for, offsets beyond 32 bits.
#include <array>
#include <functional>
#include <optional>
#include <random>
#include <thread>

#include "attention_reference.h"
#include "catch.h"
#include "tests/fuzz/cpu_kernels.h"
#include "tests/fuzz/threads.h"

using namespace anyflash;

namespace {

constexpr reference::Arithmetic kFp32{Dtype::fp32, 0, 2e-7};

// A small call with every feature that has a gradient or changes one.
struct Small {
  static constexpr int64_t kQueries = 3, kKeys = 4, kHeads = 2, kDim = 5, kDimV = 3;
  std::array<float, kQueries * kHeads * kDim> q;
  std::array<float, kKeys * kDim> k;
  std::array<float, kKeys * kDimV> v;
  std::array<float, kQueries * kHeads * kDimV> out, dout;
  std::array<float, kQueries * kHeads> lse, dlse;
  std::array<float, kQueries * kKeys> bias;
  std::array<float, kHeads> sinks, slopes;
  std::array<int64_t, 2> rng_state{5, 9};
  AttentionParams p{};

  Small() {
    std::mt19937 engine(7);
    std::normal_distribution<float> normal;
    const auto fill = [&](auto& values) {
      for (float& x : values) x = normal(engine);
    };
    fill(q), fill(k), fill(v), fill(dout), fill(dlse), fill(bias), fill(sinks), fill(slopes);
    p.q = {q.data(), 0, kHeads * kDim, kDim};
    p.k = {k.data(), 0, kDim, 0};
    p.v = {v.data(), 0, kDimV, 0};
    p.out = {out.data(), 0, kHeads * kDimV, kDimV};
    p.dout = {dout.data(), 0, kHeads * kDimV, kDimV};
    p.dq = p.q, p.dk = p.k, p.dv = p.v;
    p.lse = {lse.data(), 0, kQueries};
    p.dlse = {dlse.data(), 0, kQueries};
    p.batch = p.heads_k = 1;
    p.heads = kHeads;
    p.head_dim = kDim, p.head_dim_v = kDimV;
    p.seqlen_q = kQueries, p.seqlen_k = kKeys;
    p.softmax_scale = 0.5f;
    p.softcap = 1.5f;
    p.window_left = 2, p.window_right = 1;
    p.alibi_slopes = slopes.data();
    p.sinks = sinks.data();
    p.bias = bias.data(), p.bias_type = BiasType::fp32;
    p.bias_stride[2] = p.dbias_stride[2] = kKeys;
    p.bias_stride[3] = p.dbias_stride[3] = 1;
    p.dropout_p = 0.3, p.rng_state = rng_state.data();
  }

  // sum of out * dout + lse * dlse, whose gradients the backward gives.
  double loss() const {
    reference::Values o(out.size()), l(lse.size());
    reference::forward(p, kFp32, o, l);
    double sum = 0;
    for (size_t i = 0; i < out.size(); ++i) sum += o.value[i] * dout[i];
    for (size_t i = 0; i < lse.size(); ++i) sum += l.value[i] * dlse[i];
    return sum;
  }

  void attend() {
    reference::Values o(out.size()), l(lse.size());
    reference::forward(p, kFp32, o, l);
    for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(o.value[i]);
    for (size_t i = 0; i < lse.size(); ++i) lse[i] = static_cast<float>(l.value[i]);
  }
};

// Queries of 0 with a bias, so that logits are known to the last bit: those of each head lie around
// a size of its own.
struct BiasAlone {
  static constexpr int64_t kKeys = 230, kDim = 8;
  static constexpr std::array<float, 10> kSizes{3.3f,     257.3f,  20011.7f, -3.1e5f,  4.7e6f,
                                                1.127e8f, -2.9e8f, 6.1e8f,   -8.7e10f, 3.3e33f};
  static constexpr auto kHeads = static_cast<int64_t>(kSizes.size());

  Dtype dtype;
  fuzz::Random random{5};
  fuzz::Guarded q, k, v, out, dout, dq, dk, dv;
  std::vector<float> lse, dlse, bias, dbias;
  std::array<float, kHeads> sinks, dsinks{};
  AttentionParams p{};

  // A key's logit is `floats_above` floats from its head's size; a sink has the size of the head
  // that is `sink` heads further.
  BiasAlone(Dtype type, int64_t queries, int (*floats_above)(int64_t key), std::optional<int> sink)
      : dtype(type), lse(kHeads * queries), dlse(lse.size()) {
    for (const float size : kSizes) {
      for (int64_t key = 0; key < kKeys; ++key) {
        const int floats = floats_above(key);
        const float there = std::copysign(std::numeric_limits<float>::infinity(), floats);
        float logit = size;
        for (int i = 0; i < std::abs(floats); ++i) logit = std::nextafter(logit, there);
        bias.push_back(logit);
      }
    }
    dbias.resize(bias.size());
    p.q = rows(q, queries, 0), p.k = rows(k, kKeys, 1), p.v = rows(v, kKeys, 1);
    p.out = rows(out, queries, 0), p.dout = rows(dout, queries, 1);
    p.dq = rows(dq, queries, 0), p.dk = rows(dk, kKeys, 0), p.dv = rows(dv, kKeys, 0);
    for (float& x : dlse) x = static_cast<float>(random.normal());
    p.lse = {lse.data(), 0, queries};
    p.dlse = {dlse.data(), 0, queries};
    p.batch = 1, p.heads = p.heads_k = kHeads;
    p.head_dim = p.head_dim_v = kDim;
    p.seqlen_q = queries, p.seqlen_k = kKeys;
    p.softmax_scale = 1;
    p.window_left = p.window_right = -1;
    p.bias = bias.data(), p.bias_type = BiasType::fp32;
    p.bias_stride[1] = p.dbias_stride[1] = kKeys;
    p.bias_stride[3] = p.dbias_stride[3] = 1;
    p.dbias = dbias.data();
    if (!sink) return;
    for (int64_t head = 0; head < kHeads; ++head) sinks[head] = kSizes[(head + *sink) % kHeads];
    p.sinks = sinks.data(), p.dsinks = dsinks.data();
  }

  Rows rows(fuzz::Guarded& x, int64_t count, double amplitude) {
    const int64_t size = count * kHeads * kDim;
    x = fuzz::Guarded(size * fuzz::bytes_of(dtype), true);
    for (int64_t at = 0; at < size; ++at) {
      fuzz::write(dtype, x.as(), at, amplitude * random.normal());
    }
    return {x.as(), 0, kHeads * kDim, kDim};
  }

  // The names of those that are not what the reference has for them.
  std::string wrong_results(const reference::Arithmetic& arithmetic) const {
    reference::Values o(p.seqlen_q * kHeads * kDim), l(lse.size());
    reference::forward(p, arithmetic, o, l);
    return differ("out ", dtype, out.as(), o) + differ("lse ", Dtype::fp32, lse.data(), l);
  }
  std::string wrong_gradients(const reference::Arithmetic& arithmetic) const {
    reference::Values to_q(p.seqlen_q * kHeads * kDim), to_k(kKeys * kHeads * kDim), to_v = to_k;
    reference::Values to_bias(bias.size()), to_sinks(p.dsinks ? kHeads : 0);
    reference::backward(p, arithmetic, to_q, to_k, to_v, &to_bias, p.dsinks ? &to_sinks : nullptr);
    return differ("dq ", dtype, dq.as(), to_q) + differ("dk ", dtype, dk.as(), to_k) +
           differ("dv ", dtype, dv.as(), to_v) +
           differ("dbias ", Dtype::fp32, dbias.data(), to_bias) +
           differ("dsinks ", Dtype::fp32, dsinks.data(), to_sinks);
  }

 private:
  std::string differ(const char* name, Dtype stored, const void* found,
                     const reference::Values& expected) const {
    const double tolerance = dtype == Dtype::fp32 ? 2e-5 : 0x1p-7;
    for (size_t i = 0; i < expected.value.size(); ++i) {
      const double x = expected.value[i];
      const double error = std::fabs(reference::read(stored, found, static_cast<int64_t>(i)) - x);
      if (!(error <= tolerance * (1 + std::fabs(x)))) return name;
    }
    return "";
  }
};

std::vector<fuzz::Kernels> kernels_or_skip() {
  std::vector<fuzz::Kernels> kernels = fuzz::kernels_here();
  if (kernels.empty()) WARN("skipped: no attention kernel for this CPU");
  return kernels;
}

}  // namespace

TEST_CASE("attention reference: without scores, the mean of the visible values",
          "[cpu_attention]") {
  Small call;
  call.p.softmax_scale = 0;
  call.p.dropout_p = 0;
  call.p.alibi_slopes = call.p.sinks = nullptr;
  call.p.bias = nullptr;
  call.p.window_left = -1, call.p.window_right = 0;
  call.attend();
  for (int64_t i = 0; i < Small::kQueries; ++i) {
    const int64_t visible = i + 2;  // the last query stands beside the last key
    double mean = 0;
    for (int64_t j = 0; j < visible; ++j) mean += call.v[j * Small::kDimV];
    CHECK(call.out[i * Small::kHeads * Small::kDimV] == Approx(mean / visible));
    CHECK(call.lse[i] == Approx(std::log(visible)));
  }
}

TEST_CASE("attention reference: gradients agree with differences", "[cpu_attention]") {
  Small call;
  call.attend();
  reference::Values dq(call.q.size()), dk(call.k.size()), dv(call.v.size());
  reference::Values dbias(call.bias.size()), dsinks(call.sinks.size());
  reference::backward(call.p, kFp32, dq, dk, dv, &dbias, &dsinks);
  const auto agree = [&](auto& values, const reference::Values& gradient) {
    for (size_t i = 0; i < values.size(); ++i) {
      const float x = values[i];
      values[i] = x + 0x1p-10f;
      const double above = call.loss(), right = values[i];
      values[i] = x - 0x1p-10f;
      const double below = call.loss(), left = values[i];
      values[i] = x;
      CHECK(gradient.value[i] ==
            Approx((above - below) / (right - left)).epsilon(1e-4).margin(1e-5));
    }
  };
  agree(call.q, dq);
  agree(call.k, dk);
  agree(call.v, dv);
  agree(call.bias, dbias);
  agree(call.sinks, dsinks);
}

TEST_CASE("cpu attention: callers at once get what they get one after the other",
          "[cpu_attention]") {
  const std::vector<fuzz::Kernels> kernels = kernels_or_skip();
  if (kernels.empty()) return;
  constexpr int kCallers = 4, kCalls = 12;
  std::vector<fuzz::Problem> problems;
  const auto kernels_for = [&](size_t i) { return kernels[i % kernels.size()]; };
  for (int i = 0; i < kCallers * kCalls; ++i) {
    problems.push_back(fuzz::random_problem(900 + i, kernels_for(i).scope(fuzz::Kind::any)));
  }
  std::vector<fuzz::Results> alone(problems.size()), together(problems.size());
  for (size_t i = 0; i < problems.size(); ++i) {
    REQUIRE(kernels_for(i).run(problems[i], nullptr, alone[i]) == 0);
  }
  std::array<int32_t, kCallers> errors{};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([&, caller] {
      const CpuThreads threads{fuzz::kParallelFors[caller % 3], 3};
      for (int i = caller; i < kCallers * kCalls; i += kCallers) {
        const CpuThreads* where = caller == 0 ? nullptr : &threads;
        errors[caller] |= kernels_for(i).run(problems[i], where, together[i]);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(errors == std::array<int32_t, kCallers>{});
  for (size_t i = 0; i < problems.size(); ++i) {
    CAPTURE(i, problems[i].describe());
    CHECK(alone[i] == together[i]);
  }
}

TEST_CASE("cpu attention: a parallel-for that fails", "[cpu_attention]") {
  const std::vector<fuzz::Kernels> kernels = kernels_or_skip();
  if (kernels.empty()) return;
  constexpr int64_t kRows = 512, kDim = 64;
  std::vector<float> x(kRows * kDim, 0.5f), out(x.size()), lse(kRows);
  AttentionParams p{};
  p.q = p.k = p.v = {x.data(), 0, kDim, 0};
  p.out = {out.data(), 0, kDim, 0};
  p.lse = {lse.data(), 0, kRows};
  p.batch = p.heads = p.heads_k = 1;
  p.head_dim = p.head_dim_v = kDim;
  p.seqlen_q = p.seqlen_k = kRows;
  p.softmax_scale = 0.125f;
  p.window_left = p.window_right = -1;
  const CpuThreads threads{[](int64_t, int64_t, int64_t, RangeBody, void*) -> int32_t { return 1; },
                           4};
  for (const fuzz::Kernels& kernel : kernels) {
    if (kernel.forward->dtype != Dtype::fp32) continue;
    CAPTURE(kernel.forward->name);
    CHECK(anyflash_launch(kernel.forward, &p, const_cast<CpuThreads*>(&threads)) ==
          kErrorParallelFor);
    CHECK(std::string(anyflash_error_string(kErrorParallelFor)) ==
          "the parallel-for of the caller failed");
  }
}

TEST_CASE("cpu attention: key heads that do not divide the heads", "[cpu_attention]") {
  for (const fuzz::Kernels& kernel : kernels_or_skip()) {
    AttentionParams p{};
    p.batch = 1, p.heads = 3, p.heads_k = 2;
    CAPTURE(kernel.forward->name);
    CHECK(anyflash_launch(kernel.forward, &p, nullptr) == kErrorInvalidParams);
  }
}

TEST_CASE("cpu attention: rows further apart than 32 bits can say", "[cpu_attention]") {
  constexpr int64_t kRows = 5, kDim = 24, kNear = kDim, kFar = (int64_t{1} << 30) + 8;
  for (const fuzz::Kernels& kernel : kernels_or_skip()) {
    if (kernel.backward == nullptr) continue;
    const Dtype dtype = kernel.forward->dtype;
    const int64_t bytes = fuzz::bytes_of(dtype);
    CAPTURE(kernel.forward->name);
    // q, k, v, dout, out, dq, dk, dv: near and far. Only pages that are touched take memory.
    std::vector<std::vector<double>> found;
    for (const int64_t stride : {kNear, kFar}) {
      std::vector<fuzz::Guarded> memory;
      try {
        for (int i = 0; i < 8; ++i) {
          memory.emplace_back(((kRows - 1) * stride + kDim) * bytes, true);
        }
      } catch (const std::bad_alloc&) {
        WARN("skipped: not enough address space");
        return;
      }
      fuzz::Random random(3);
      for (int i = 0; i < 4; ++i) {
        for (int64_t at = 0; at < kRows * kDim; ++at) {
          fuzz::write(dtype, memory[i].as(), at / kDim * stride + at % kDim, random.normal());
        }
      }
      AttentionParams p{};
      Rows* rows[] = {&p.q, &p.k, &p.v, &p.dout, &p.out, &p.dq, &p.dk, &p.dv};
      for (int i = 0; i < 8; ++i) *rows[i] = {memory[i].as(), 0, stride, 0};
      std::array<float, kRows> lse;
      p.lse = {lse.data(), 0, kRows};
      p.batch = p.heads = p.heads_k = 1;
      p.head_dim = p.head_dim_v = kDim;
      p.seqlen_q = p.seqlen_k = kRows;
      p.softmax_scale = 0.2f;
      p.window_left = -1, p.window_right = 0;
      REQUIRE(anyflash_launch(kernel.forward, &p, nullptr) == 0);
      REQUIRE(anyflash_launch(kernel.backward, &p, nullptr) == 0);
      found.emplace_back(lse.begin(), lse.end());
      for (int i = 4; i < 8; ++i) {
        for (int64_t at = 0; at < kRows * kDim; ++at) {
          found.back().push_back(
              reference::read(dtype, memory[i].as(), at / kDim * stride + at % kDim));
        }
      }
    }
    CHECK(found[0] == found[1]);
  }
}

// Problems of the fuzz test that some kernel once got wrong.
TEST_CASE("cpu attention: shapes that once were wrong", "[cpu_attention]") {
  struct Case {
    const char* what;
    fuzz::Shape shape;
    uint64_t seed;
  };
  fuzz::Shape far_rows;  // the sum of a row's weights, where their reference is a rounded product
  far_rows.heads = 6, far_rows.heads_k = 1;
  far_rows.head_dim = 8, far_rows.head_dim_v = 143;
  far_rows.seqlen_q = 123, far_rows.seqlen_k = 20;
  far_rows.softmax_scale = -0.711;
  far_rows.window_right = 15;
  far_rows.alibi = fuzz::Slopes::heads;
  far_rows.bias_type = BiasType::fp32, far_rows.bias_size = 1.127e8;
  far_rows.backward = true;
  fuzz::Shape far_sinks;  // above logits that are not far
  far_sinks.heads = 12, far_sinks.heads_k = 3;
  far_sinks.head_dim = far_sinks.head_dim_v = 10;
  far_sinks.seqlen_q = far_sinks.seqlen_k = 25;
  far_sinks.sinks = far_sinks.dsinks = true, far_sinks.sink_size = 8e4;
  far_sinks.backward = far_sinks.dlse = true;
  fuzz::Shape many_keys;  // whose weights are nearly equal: the roundings of their sum add up
  many_keys.heads = 7, many_keys.heads_k = 1;
  many_keys.head_dim = many_keys.head_dim_v = 4;
  many_keys.seqlen_q = 2, many_keys.seqlen_k = 20306;
  many_keys.softmax_scale = 3, many_keys.softcap = 1;
  const Case cases[] = {
      {"far rows", far_rows, 3}, {"far sinks", far_sinks, 1}, {"many keys", many_keys, 1}};
  for (const fuzz::Kernels& kernel : kernels_or_skip()) {
    for (const Case& one : cases) {
      const fuzz::Problem problem(one.shape, kernel.forward->dtype, one.seed);
      fuzz::Results results;
      REQUIRE(kernel.run(problem, nullptr, results) == 0);
      double worst = 0;
      CAPTURE(kernel.forward->name, one.what);
      CHECK(problem.check(results, problem.params(), kernel.arithmetic(), &worst) == "");
    }
  }
}

// The reference's bounds grow with the logits, since dot products do. A bias alone is exact: what a
// row's weights are to each other then owes nothing to where its logits lie.
TEST_CASE("cpu attention: weights of logits that lie far from 0", "[cpu_attention]") {
  struct Case {
    const char* what;
    int (*floats_above)(int64_t key);
    std::optional<int> sink;
  };
  const Case cases[] = {
      {"equal", [](int64_t) { return 0; }, {}},
      {"equal to the sink", [](int64_t) { return 0; }, 0},
      {"far from the sink", [](int64_t) { return 0; }, 1},
      {"larger, key by key", [](int64_t key) { return static_cast<int>(key / 16); }, {}},
      {"larger, block by block", [](int64_t key) { return static_cast<int>(key / 90); }, 0},
      {"smaller, block by block", [](int64_t key) { return -static_cast<int>(key / 90); }, 0},
  };
  for (const fuzz::Kernels& kernel : kernels_or_skip()) {
    for (const int64_t queries : {2, 7, 40}) {  // each kernel's way of few, some and many rows
      for (const Case& one : cases) {
        CAPTURE(kernel.forward->name, queries, one.what);
        BiasAlone call(kernel.forward->dtype, queries, one.floats_above, one.sink);
        REQUIRE(anyflash_launch(kernel.forward, &call.p, nullptr) == 0);
        CHECK(call.wrong_results(kernel.arithmetic()) == "");
        if (kernel.backward == nullptr) continue;
        REQUIRE(anyflash_launch(kernel.backward, &call.p, nullptr) == 0);
        CHECK(call.wrong_gradients(kernel.arithmetic()) == "");
      }
    }
  }
}
