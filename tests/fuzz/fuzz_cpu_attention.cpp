// Random attention problems on the CPU kernels, forward and backward, against double arithmetic:
//
//   fuzz_cpu_attention [--count N] [--seed S] [--isa NAME] [--only forward|decode|backward]
//   [--perturb]
//
// Problem i has seed S + i; a failing one prints the command that repeats it. Every buffer lies
// between guard pages, inputs are read-only while a kernel runs, and what nothing may be read from
// or written to is NaN. Results for one thread and for several must be equal bit for bit. --perturb
// asks instead how often the check notices a reference that is wrong by one key or by its dropout.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "tests/fuzz/cpu_kernels.h"
#include "tests/fuzz/perturb.h"
#include "tests/fuzz/threads.h"

// Of a sanitizer's runtime, where there is one.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

namespace anyflash::fuzz {
namespace {

struct Options {
  int64_t count = 1000;
  uint64_t seed = 1;
  std::string isa;
  std::string only;
  bool perturb = false;

  Kind kind() const {
    return only == "forward"    ? Kind::forward
           : only == "decode"   ? Kind::decode
           : only == "backward" ? Kind::backward
                                : Kind::any;
  }
  std::string repeat(uint64_t at) const {
    return "fuzz_cpu_attention --count 1 --seed " + std::to_string(at) +
           (isa.empty() ? "" : " --isa " + isa) + (only.empty() ? "" : " --only " + only);
  }
};

// What runs, for those that see it end unexpectedly.
char running[200];

void say_what_runs() {
  const ssize_t written = ::write(STDERR_FILENO, running, std::strlen(running));
  (void)written;
}

void on_fault(int signal) {
  say_what_runs();
  std::signal(signal, SIG_DFL);  // the instruction repeats, and the process ends
}

const Kernels& choose(const std::vector<Kernels>& all, uint64_t seed) {
  return all[Random(~seed).bits() % all.size()];
}

struct Summary {
  int64_t failures = 0;
  int64_t backwards = 0;
  std::map<std::string, int64_t> kernels;
  int64_t features[feature_number::count] = {};
  std::map<std::string, double> worst;  // by kernel

  void print(int64_t count) const {
    std::printf("%ld problems, %ld with backward, %ld failures\n ", long(count), long(backwards),
                long(failures));
    for (uint32_t i = 0; i < feature_number::count; ++i) {
      if (features[i]) std::printf(" %s %ld", kFeatureTexts[i].name, long(features[i]));
    }
    std::printf("\n");
    for (const auto& [name, problems] : kernels) {
      std::printf("  %-32s %7ld problems, largest error %.2f of its bound\n", name.c_str(),
                  long(problems), worst.at(name));
    }
  }
};

std::string try_problem(const Kernels& kernels, uint64_t seed, Kind kind, Summary& summary) {
  const Problem problem = random_problem(seed, kernels.scope(kind));
  const std::string name = kernels.forward->name;
  ++summary.kernels[name];
  summary.backwards += problem.shape().backward;
  const Features features = problem.features();
  for (uint32_t i = 0; i < feature_number::count; ++i) summary.features[i] += features >> i & 1;

  Random random(seed ^ 0x5A5A5A5A);
  const CpuThreads threads{kParallelFors[random.integer(0, 2)],
                           static_cast<int32_t>(random.integer(2, 7))};
  Results one, several;
  std::string wrong;
  for (const auto& [results, where] :
       {std::pair{&one, static_cast<const CpuThreads*>(nullptr)}, std::pair{&several, &threads}}) {
    if (const int32_t error = kernels.run(problem, where, *results)) {
      return name + " " + problem.describe() + ": " + anyflash_error_string(error);
    }
  }
  if (!(one == several)) wrong = "one thread and several differ; ";
  wrong += problem.check(one, problem.params(), kernels.arithmetic(), &summary.worst[name]);
  return wrong.empty() ? wrong : name + " " + problem.describe() + ": " + wrong;
}

int fuzz(const Options& options, const std::vector<Kernels>& all) {
  Summary summary;
  for (int64_t i = 0; i < options.count; ++i) {
    const uint64_t seed = options.seed + static_cast<uint64_t>(i);
    const Kernels& kernels = choose(all, seed);
    std::snprintf(running, sizeof(running), "while running %s: %s\n", kernels.forward->name,
                  options.repeat(seed).c_str());
    const std::string wrong = try_problem(kernels, seed, options.kind(), summary);
    if (wrong.empty()) continue;
    ++summary.failures;
    if (summary.failures <= 20) {
      std::printf("%s\n    %s\n", wrong.c_str(), options.repeat(seed).c_str());
    }
  }
  summary.print(options.count);
  return summary.failures == 0 ? 0 : 1;
}

int perturb(const Options& options, const std::vector<Kernels>& all) {
  bool all_noticed = true;
  for (const Perturbation& perturbation : kPerturbations) {
    int64_t tried = 0, noticed = 0;
    for (int64_t i = 0; i < options.count; ++i) {
      const uint64_t seed = options.seed + static_cast<uint64_t>(i);
      const Kernels& kernels = choose(all, seed);
      const Problem problem = random_problem(seed, kernels.scope(options.kind()));
      AttentionParams judged = problem.params();
      Changed changed;
      perturbation.apply(judged, changed);
      if (!differ(problem.params(), judged)) continue;
      Results results;
      if (kernels.run(problem, nullptr, results) != 0) return 1;
      double worst = 0;
      ++tried;
      noticed += !problem.check(results, judged, kernels.arithmetic(), &worst).empty();
    }
    std::printf("%-24s noticed in %ld of %ld problems\n", perturbation.name, long(noticed),
                long(tried));
    // A key may weigh too little to be missed: with a large softcap or far from ALiBi's diagonal.
    all_noticed = all_noticed && tried > 0 && noticed >= 0.97 * tried;
  }
  return all_noticed ? 0 : 1;
}

int usage(const char* program) {
  std::fprintf(stderr,
               "usage: %s [--count N] [--seed S] [--isa NAME] [--only forward|decode|backward] "
               "[--perturb]\n",
               program);
  return 2;
}

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--perturb") {
      options.perturb = true;
      continue;
    }
    if (i + 1 == argc) return usage(argv[0]);
    const char* value = argv[++i];
    if (name == "--count") {
      options.count = std::atoll(value);
    } else if (name == "--seed") {
      options.seed = std::strtoull(value, nullptr, 10);
    } else if (name == "--isa") {
      options.isa = value;
    } else if (name == "--only") {
      options.only = value;
    } else {
      return usage(argv[0]);
    }
  }
  const std::vector<Kernels> all = kernels_here(options.isa);
  if (all.empty()) {
    std::printf("no attention kernel for this CPU (%s)\n", isa_name(anyflash_cpu_isa()));
    return options.isa.empty() ? 0 : 1;
  }
  std::signal(SIGSEGV, on_fault);
  std::signal(SIGBUS, on_fault);
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(say_what_runs);
  return options.perturb ? perturb(options, all) : fuzz(options, all);
}

}  // namespace
}  // namespace anyflash::fuzz

int main(int argc, char** argv) { return anyflash::fuzz::main(argc, argv); }
