#include "core/notice.h"

#include <array>
#include <atomic>
#include <cstdio>
#include <mutex>
#include <set>

#include "core/environment.h"
#include "core/text.h"

namespace anyflash {
namespace {

std::atomic<NoticeSink> notice_sink{nullptr};

BackEnd back_end_of(Route route) {
  switch (route) {
    case Route::kernel:
      return BackEnd::kernel;
    case Route::math:
      return BackEnd::math;
    default:
      return BackEnd::sdpa;
  }
}

const char* route_phrase(Route route) {
  switch (route) {
    case Route::kernel:
      return "anyflash's kernel (kernel)";
    case Route::aten_cudnn:
      return "cuDNN's attention in PyTorch (aten_cudnn)";
    case Route::aten_flash:
      return "PyTorch's flash attention (aten_flash)";
    case Route::aten_efficient:
      return "PyTorch's memory-efficient attention (aten_efficient)";
    case Route::aten_cpu:
      return "PyTorch's CPU attention (aten_cpu)";
    case Route::aten_sdpa:
      return "PyTorch's public attention (aten_sdpa)";
    default:
      return "plain PyTorch operators (math)";
  }
}

bool runs_on(BackEnd back_end, Route route, Family family) {
  if (family != Family::attention) {  // a kernel or plain operators
    return (back_end == BackEnd::kernel) == (route == Route::kernel);
  }
  return back_end == back_end_of(route) ||
         std::string(route_name(route)) == kBackEndNames[static_cast<int32_t>(back_end)];
}

// Choices already told, by a number that stands for one. A collision costs a look into the set of
// texts, nothing else.
class Told {
 public:
  bool contains(uint64_t number) const {
    for (int i = 0; i < kProbes; ++i) {
      if (slot(number, i).load(std::memory_order_relaxed) == number) return true;
    }
    return false;
  }

  void insert(uint64_t number) {
    for (int i = 0; i < kProbes; ++i) {
      uint64_t empty = 0;
      if (slot(number, i).compare_exchange_strong(empty, number)) return;
    }
    slot(number, 0).store(number, std::memory_order_relaxed);
  }

 private:
  static constexpr int kProbes = 4;
  static constexpr uint64_t kSlots = 1024;
  std::atomic<uint64_t>& slot(uint64_t number, int i) { return slots_[(number + i) % kSlots]; }
  const std::atomic<uint64_t>& slot(uint64_t number, int i) const {
    return slots_[(number + i) % kSlots];
  }
  std::array<std::atomic<uint64_t>, kSlots> slots_{};
};

Told told;

uint64_t number_of(const Problem& problem, Route route) {
  uint64_t number = 1469598103934665603u;
  const auto mix = [&number](uint64_t value) {
    number = (number ^ value) * 1099511628211u;
    number ^= number >> 29;
  };
  mix(static_cast<uint64_t>(problem.family) << 8 | static_cast<uint64_t>(problem.direction) << 4 |
      static_cast<uint64_t>(problem.device));
  mix(static_cast<uint64_t>(problem.sm) << 32 | static_cast<uint64_t>(problem.dtype) << 8 |
      static_cast<uint64_t>(route));
  mix(static_cast<uint64_t>(problem.head_dim) << 32 | static_cast<uint64_t>(problem.head_dim_v));
  mix(problem.features);
  mix(static_cast<uint64_t>(problem.order));
  return number == 0 ? 1 : number;
}

// `anyflash: attention runs on plain PyTorch operators (math), because ...`
std::string fallback_text(const Problem& problem, const Decision& decision) {
  const bool attention = problem.family == Family::attention;
  const Route route = decision.choice.route;
  std::string why;
  for (const Reason& reason : decision.reasons) {
    if (reason.text.rfind("runs on ", 0) == 0) continue;  // another device's route is no news
    why += text(why.empty() ? "" : "; ", route_name(reason.route), ": ", reason.text);
  }
  const bool is_last_resort = attention && route == Route::math;
  return text("anyflash: ", family_name(problem.family), " runs on ", route_phrase(route),
              ", because ", why, ". To choose it yourself: ",
              is_last_resort ? "with anyflash.backend(\"math\")" : "ANYFLASH_BACKEND=sdpa,math",
              ". To make it an error: ANYFLASH_STRICT=1. The whole decision: python -m anyflash "
              "explain. This is said once.");
}

// `anyflash: attention forward, bf16, head_dim 128, causal: runs on anyflash's kernel (...)`
std::string choice_text(const Problem& problem, const Choice& choice) {
  const std::string where = choice.instance != nullptr
                                ? text("anyflash's kernel (", choice.instance->name, ")")
                                : std::string(route_phrase(choice.route));
  return text("anyflash: ", problem_text(problem), ": runs on ", where);
}

}  // namespace

void note_choice(const Problem& problem, const Choice& choice) {
  const uint64_t number = number_of(problem, choice.route);
  if (told.contains(number)) return;
  if (!runs_on(first_back_end(problem.order), choice.route, problem.family)) {
    tell_once(Level::warning, fallback_text(problem, decide(problem)));
  } else if (problem.family == Family::attention) {
    tell_once(Level::info, choice_text(problem, choice));
  }
  told.insert(number);
}

void set_notice_sink(NoticeSink sink) { notice_sink.store(sink); }

void tell_once(Level level, const std::string& notice) {
  static std::mutex mutex;
  static std::set<std::string> told_texts;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!told_texts.insert(notice).second) return;
  }
  // Outside of the lock: a sink in Python waits for the interpreter.
  if (NoticeSink sink = notice_sink.load()) {
    sink(static_cast<int32_t>(level), notice.c_str());
  } else if (level == Level::warning || environment().verbose) {
    std::fprintf(stderr, "%s\n", notice.c_str());
  }
}

}  // namespace anyflash
