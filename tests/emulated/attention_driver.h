// What the programs share that run the attention kernels on the emulator and on a GPU: instances
// times cases, and the command line
//
//   [--instance TEXT] [--case TEXT] [--every N] [--runs N] [--random N] [--seed S]
//   [--list] [--stop-early]
//
// Every instance whose name contains TEXT, on every case (attention_cases.h) whose name contains
// TEXT, or every Nth of them. A case passes if the machine finds nothing wrong, results are within
// the bounds of the float64 reference, nothing else was written, and all runs give the same bits.
// --random adds drawn problems, from seed S on; --stop-early ends at the first failure.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "tests/emulated/attention_cases.h"
#include "tests/emulated/attention_run.h"
#include "tests/fuzz/random_shape.h"

namespace anyflash::emulated {

struct Settings {
  std::string instance;
  std::string case_name;
  int64_t every = 1;
  int64_t runs;
  int64_t random = 0;
  int64_t seed = 1;
  bool list = false;
  bool stop_early = false;

  // False if there is no such option.
  bool take(const std::string& name, const char* value) {
    if (name == "--instance") {
      instance = value;
    } else if (name == "--case") {
      case_name = value;
    } else if (name == "--every") {
      every = std::max(1ll, std::atoll(value));
    } else if (name == "--runs") {
      runs = std::max(1ll, std::atoll(value));
    } else if (name == "--random") {
      random = std::atoll(value);
    } else if (name == "--seed") {
      seed = std::atoll(value);
    } else {
      return false;
    }
    return true;
  }
};

// A Machine has
//   static constexpr int64_t kRuns;           // of a case, unless --runs says otherwise
//   static constexpr bool kOrdersAdditions;  // what blocks add to global memory comes in one order
//   std::string run(const Instance*, const fuzz::Problem&, bool deterministic, int64_t number,
//                   int64_t run, fuzz::Results&);  // `number` counts the cases

template <class Machine>
class Driver {
 public:
  int main(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
      const std::string name = argv[i];
      if (name == "--list") {
        settings_.list = true;
      } else if (name == "--stop-early") {
        settings_.stop_early = true;
      } else if (i + 1 < argc && settings_.take(name, argv[i + 1])) {
        ++i;
      } else {
        std::fprintf(stderr,
                     "usage: %s [--instance TEXT] [--case TEXT] [--every N] [--runs N] "
                     "[--random N] [--seed S] [--list] [--stop-early]\n",
                     argv[0]);
        return 2;
      }
    }
    for (const Instance* instance : instances(settings_.instance)) run_instance(instance);
    if (cases_ == 0) std::printf("no instance and case of these names\n");
    return failures_ == 0 && cases_ > 0 ? 0 : 1;
  }

 private:
  void run_instance(const Instance* instance) {
    const auto begin = std::chrono::steady_clock::now();
    const int64_t cases = cases_, failures = failures_;
    worst_ = 0;
    int64_t position = 0;
    for (const Case& c : attention_cases(instance->max_head_dim)) {
      if (c.name.find(settings_.case_name) == std::string::npos) continue;
      if (position++ % settings_.every != 0) continue;
      run_case(instance, c.name, c.shape, static_cast<uint64_t>(settings_.seed));
    }
    for (int64_t i = 0; i < settings_.random; ++i) run_random(instance, settings_.seed + i);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    std::printf("%-36s %4ld cases, %ld failures, largest error %.2f of its bound, %.1f s\n",
                instance->name, long(cases_ - cases), long(failures_ - failures), worst_,
                seconds.count());
    std::fflush(stdout);
  }

  void run_random(const Instance* instance, int64_t seed) {
    const bool backward = instance->direction == Direction::backward;
    fuzz::Scope scope{instance->dtype, instance->features, backward,
                      backward ? fuzz::Kind::backward : fuzz::Kind::any};
    scope.max_head_dim = instance->max_head_dim;
    scope.head_dim_multiple = 8;
    scope.far_scores = !backward;
    fuzz::Random random(static_cast<uint64_t>(seed));
    const fuzz::Shape shape = fuzz::random_shape(random, scope);
    run_case(instance, "--random 1 --seed " + std::to_string(seed), shape, random.bits());
  }

  void run_case(const Instance* instance, const std::string& name, fuzz::Shape shape,
                uint64_t seed) {
    shape.clears_rest = true;  // as kernels on GPUs do
    if (instance->direction == Direction::backward && !shape.backward) {
      shape.backward = true;
      shape.dlse = shape.dlse || cases_ % 3 == 0;
      shape.dsinks = shape.sinks;
    }
    const fuzz::Problem problem(shape, instance->dtype, seed);
    if (problem.features() & ~instance->features) return;
    if (settings_.stop_early && failures_ > 0) return;
    ++cases_;
    if (settings_.list) {
      std::printf("%-32s %s\n", name.c_str(), problem.describe().c_str());
      return;
    }
    const reference::Arithmetic arithmetic = arithmetic_of(instance->dtype, problem.params());
    fuzz::Results first;
    for (int64_t run = 0; run < settings_.runs; ++run) {
      fuzz::Results results = problem.forward_results();
      if (shape.backward) {
        problem.fill_forward_results(results, arithmetic);
        problem.add_backward_results(results);
      }
      // Of the backward every second pair of cases, other ones for fp16 and bf16.
      const bool deterministic =
          !shape.backward || (cases_ / 2 + (instance->dtype == Dtype::bf16)) % 2 == 0;
      const bool repeats = deterministic || Machine::kOrdersAdditions;
      std::string wrong = machine_.run(instance, problem, deterministic, cases_, run, results);
      if (run > 0 && repeats) {
        if (problem.adds_to_dbias()) results.dbias = {};  // in the order of the threads
        if (!(results == first)) wrong += "other results than in run 0";
      } else {
        wrong += problem.check(results, problem.params(), arithmetic, &worst_);
      }
      if (run == 0) {
        first = std::move(results);
        if (problem.adds_to_dbias()) first.dbias = {};
      }
      if (wrong.empty()) continue;
      ++failures_;
      std::printf("%s, %s, run %ld (%s):\n  %s\n", instance->name, name.c_str(), long(run),
                  problem.describe().c_str(), wrong.c_str());
    }
  }

  Machine machine_;
  Settings settings_{{}, {}, 1, Machine::kRuns};
  int64_t cases_ = 0;
  int64_t failures_ = 0;
  double worst_ = 0;  // error in units of its bound
};

}  // namespace anyflash::emulated
