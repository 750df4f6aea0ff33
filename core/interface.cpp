#include "core/interface.h"

#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>

#include "anyflash/kernels.h"
#include "core/describe.h"
#include "core/environment.h"
#include "core/notice.h"
#include "core/problem_text.h"
#include "core/text.h"
#include "kernels/arch.h"

namespace anyflash {
namespace {

thread_local std::string last_text;

// Runs `body`; no exception leaves.
template <typename Body>
Status guarded(Body body) {
  try {
    body();
    return Status::ok;
  } catch (const std::invalid_argument& error) {
    last_text = error.what();
    return Status::value_error;
  } catch (const std::bad_alloc&) {
    last_text = "anyflash: out of memory";
    return Status::no_memory;
  } catch (const std::exception& error) {
    last_text = error.what();
    return Status::runtime_error;
  }
}

Choice checked_choice(const Problem& problem) {
  const Choice choice = choose(problem);
  AF_CHECK(choice.route != Route::none, refusal(problem, decide(problem)));
  note_choice(problem, choice);
  return choice;
}

// The kernel for tensors like x, for an operator that is nothing else.
const Instance* only_kernel(const TensorView& x, Family family, Direction direction) {
  const Caller caller{static_cast<int64_t>(BackEnd::kernel), 0};
  return checked_choice(describe(x, family, direction, caller)).instance;
}

}  // namespace
}  // namespace anyflash

using namespace anyflash;

const char* anyflash_text(void) { return last_text.c_str(); }

Status anyflash_prepare_attention(AttentionCall* call, const BackwardCall* grad, bool causal,
                                  const Caller* caller, Choice* choice) {
  return guarded([&] {
    normalise(*call, causal);
    if (grad == nullptr) {
      check_forward(*call);
      *choice = checked_choice(describe_forward(*call, *caller));
    } else {
      check_backward(*call, *grad);
      *choice = checked_choice(describe_backward(*call, *grad, *caller));
    }
  });
}

Status anyflash_prepare_kvcache(const KVCacheCall* call, bool causal, const Caller* caller,
                                AttentionCall* attention, Choice* choice, Choice* append) {
  return guarded([&] {
    check_kvcache(*call);
    *attention = attention_over(*call);
    normalise(*attention, causal);
    *choice = checked_choice(describe_forward(*attention, *caller));
    *append = call->appends() ? checked_choice(describe_append(*call, *caller)) : Choice{};
  });
}

Status anyflash_run_attention(const Instance* instance, const AttentionCall* call,
                              const AttentionResults* results, void* where) {
  return guarded([&] { run_forward(*instance, *call, *results, where); });
}

Status anyflash_run_attention_backward(const Instance* instance, const AttentionCall* call,
                                       const BackwardCall* grad, const AttentionResults* results,
                                       void* where) {
  return guarded([&] { run_backward(*instance, *call, *grad, *results, where); });
}

Status anyflash_run_kvcache_append(const Instance* instance, const KVCacheCall* call,
                                   const AttentionOptions* options, const AppendResults* results,
                                   void* where) {
  return guarded([&] { run_append(*instance, *call, *options, *results, where); });
}

int64_t anyflash_attention_forward_workspace(const Instance* instance, const AttentionCall* call) {
  return workspace_bytes(*instance, *call);
}

int64_t anyflash_attention_backward_workspace(const Instance* instance, const AttentionCall* call,
                                              const BackwardCall* grad,
                                              const AttentionResults* results) {
  return workspace_bytes(*instance, *call, *grad, *results);
}

Status anyflash_prepare_bias_activation(const BiasActivationCall* call, const Caller* caller,
                                        Choice* choice) {
  return guarded([&] {
    check_bias_activation(*call);
    *choice = checked_choice(describe_bias_activation(*call, *caller));
  });
}

Status anyflash_run_bias_activation(const Instance* instance, const BiasActivationCall* call,
                                    const BiasActivationResults* results, void* where) {
  return guarded([&] { run_bias_activation(*instance, *call, *results, where); });
}

Status anyflash_check_fused_mlp(const MlpCall* call) {
  return guarded([&] { check_fused_mlp(*call); });
}

Status anyflash_activation(const char* name, int64_t* number) {
  return guarded([&] { *number = static_cast<int64_t>(activation_of(std::string(name))); });
}

Status anyflash_prepare_rotary(const RotaryCall* call, const Instance** kernel) {
  return guarded([&] {
    check_rotary(*call);
    if (kernel != nullptr) *kernel = only_kernel(call->x, Family::rotary, Direction::forward);
  });
}

Status anyflash_run_rotary(const Instance* instance, const RotaryCall* call, const TensorView* y,
                           void* where) {
  return guarded([&] { run_rotary(*instance, *call, *y, where); });
}

Status anyflash_prepare_norm(const NormCall* call, const NormGradient* grad,
                             const Instance** kernel) {
  return guarded([&] {
    check_norm(*call, grad);
    if (kernel == nullptr) return;
    TensorView x = grad == nullptr ? call->x : grad->z;
    if (grad != nullptr) x.dtype = static_cast<ElementType>(grad->x_dtype);
    *kernel =
        only_kernel(x, Family::norm, grad == nullptr ? Direction::forward : Direction::backward);
  });
}

int64_t anyflash_norm_workspace(const NormGradient* grad, const NormResults* results) {
  return norm_workspace(*grad, *results);
}

Status anyflash_run_norm(const Instance* instance, const NormCall* call, const NormGradient* grad,
                         const NormResults* results, void* where) {
  return guarded([&] { run_norm(*instance, *call, grad, *results, where); });
}

Status anyflash_prepare_cross_entropy(const CrossEntropyCall* call, const Instance** kernel) {
  return guarded([&] {
    check_cross_entropy(*call);
    if (kernel == nullptr) return;
    *kernel = only_kernel(call->logits, Family::cross_entropy,
                          call->dlosses.given() ? Direction::backward : Direction::forward);
  });
}

int64_t anyflash_cross_entropy_workspace(const CrossEntropyCall* call) {
  return cross_entropy_workspace(*call);
}

Status anyflash_run_cross_entropy(const Instance* instance, const CrossEntropyCall* call,
                                  const CrossEntropyResults* results, void* where) {
  return guarded([&] { run_cross_entropy(*instance, *call, *results, where); });
}

const Instance* anyflash_find_kernel(Family family, Direction direction, Dtype dtype, Device device,
                                     int32_t head_dim, uint32_t features, int32_t device_index) {
  const Instance* found = nullptr;
  guarded([&] {
    Problem problem = describe_machine(device, device_index);
    problem.family = family;
    problem.direction = direction;
    problem.dtype = dtype;
    problem.head_dim = problem.head_dim_v = head_dim;
    problem.features = features;
    problem.order = static_cast<Order>(BackEnd::kernel);
    problem.explicit_order = true;
    found = checked_choice(problem).instance;
  });
  return found;
}

Status anyflash_choose(const TensorView* x, Family family, Direction direction,
                       const Caller* caller, Choice* choice) {
  return guarded([&] { *choice = checked_choice(describe(*x, family, direction, *caller)); });
}

int64_t anyflash_plan_pieces(int64_t seqlen_q, int64_t seqlen_k, int64_t window_left,
                             int64_t window_right, PlanFor purpose, Piece* pieces, int64_t capacity,
                             int64_t* row_begin, int64_t* row_end) {
  const Plan plan = plan_pieces({seqlen_q, seqlen_k, window_left, window_right}, purpose);
  const auto count = static_cast<int64_t>(plan.pieces.size());
  std::copy_n(plan.pieces.begin(), std::min(count, capacity), pieces);
  *row_begin = plan.row_begin;
  *row_end = plan.row_end;
  return count;
}

Status anyflash_decide(const char* fields, DecisionView* view) {
  return guarded([&] {
    const Problem problem = parse_problem(fields);
    const Decision decision = decide(problem);
    view->choice = decision.choice;
    view->is_measured = false;
    if (decision.choice.instance != nullptr) {
      const auto speed = measured(*decision.choice.instance, problem);
      view->is_measured = speed.has_value();
      if (speed) view->measured = *speed;
    }
    std::string lines;
    for (const Reason& reason : decision.reasons) {
      lines += text(route_name(reason.route), "\t", reason.text, "\n");
    }
    if (decision.choice.route == Route::none) {
      lines += text("refusal\t", refusal(problem, decision), "\n");
    }
    last_text = lines;
  });
}

Status anyflash_environment_isa(const char** name, bool* lowered) {
  return guarded([&] {
    const AllowedIsa allowed = cpu_isa();
    *name = isa_name(allowed.isa);
    *lowered = allowed.lowered;
  });
}

bool anyflash_checks_values(void) { return checks_values(); }

const char* anyflash_route_name(Route route) { return route_name(route); }

void anyflash_set_notice_sink(NoticeSink sink) { set_notice_sink(sink); }

void anyflash_warn(const char* text) {
  guarded([&] { tell_once(Level::warning, text); });
}

const char* anyflash_layout(void) {
  static const std::string lines =
      text("TensorView ", sizeof(TensorView), "\nAttentionOptions ", sizeof(AttentionOptions),
           "\nAttentionCall ", sizeof(AttentionCall), "\nBackwardCall ", sizeof(BackwardCall),
           "\nAttentionResults ", sizeof(AttentionResults), "\nKVCacheCall ", sizeof(KVCacheCall),
           "\nAppendResults ", sizeof(AppendResults), "\nBiasActivationCall ",
           sizeof(BiasActivationCall), "\nBiasActivationResults ", sizeof(BiasActivationResults),
           "\nMlpCall ", sizeof(MlpCall), "\nRotaryCall ", sizeof(RotaryCall), "\nNormCall ",
           sizeof(NormCall), "\nNormGradient ", sizeof(NormGradient), "\nNormResults ",
           sizeof(NormResults), "\nCrossEntropyCall ", sizeof(CrossEntropyCall),
           "\nCrossEntropyResults ", sizeof(CrossEntropyResults), "\nCaller ", sizeof(Caller),
           "\nChoice ", sizeof(Choice), "\nPiece ", sizeof(Piece), "\nCpuThreads ",
           sizeof(CpuThreads), "\nDecisionView ", sizeof(DecisionView), "\nCubin ", sizeof(Cubin),
           "\nInstance ", sizeof(Instance), "\n");
  return lines.c_str();
}

const char* anyflash_build_compiler(void) { return __VERSION__; }
