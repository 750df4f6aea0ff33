// The core as its two callers see it: the compiled operators (csrc/) and those in Python
// (anyflash/_core.py, by ctypes). C linkage, plain structs, no exception across.
//
// What can fail returns a Status; the text of the failure is anyflash_text() of the same thread.
#pragma once

#include "core/attention.h"
#include "core/cross_entropy.h"
#include "core/kvcache.h"
#include "core/mlp.h"
#include "core/norm.h"
#include "core/notice.h"
#include "core/pieces.h"
#include "core/rotary.h"

namespace anyflash {

enum class Status : int32_t {
  ok,
  runtime_error,  // RuntimeError in Python
  value_error,    // ValueError
  no_memory,      // MemoryError
};

// A decision as plain data; its reasons are anyflash_text(): lines `route<tab>text`, and where no
// route is left a last one, `refusal<tab>text`.
struct DecisionView {
  Choice choice;
  bool is_measured = false;
  Measured measured{};
};

}  // namespace anyflash

extern "C" {

// What the last call of this thread had to say; valid until the next.
ANYFLASH_EXPORT const char* anyflash_text(void);

// ---- Attention: normalises `call`, checks, describes, decides, tells. `grad` is null for the
// forward.
ANYFLASH_EXPORT anyflash::Status anyflash_prepare_attention(anyflash::AttentionCall* call,
                                                            const anyflash::BackwardCall* grad,
                                                            bool causal,
                                                            const anyflash::Caller* caller,
                                                            anyflash::Choice* choice);
// The same for a call with a cache: `attention` is what comes after the append. `append` has the
// route none where nothing is appended. Nothing has been written yet.
ANYFLASH_EXPORT anyflash::Status anyflash_prepare_kvcache(
    const anyflash::KVCacheCall* call, bool causal, const anyflash::Caller* caller,
    anyflash::AttentionCall* attention, anyflash::Choice* choice, anyflash::Choice* append);
// With the route `kernel`; what must have been converted: core/attention.h. `where` is a stream or
// a CpuThreads.
ANYFLASH_EXPORT anyflash::Status anyflash_run_attention(const anyflash::Instance* instance,
                                                        const anyflash::AttentionCall* call,
                                                        const anyflash::AttentionResults* results,
                                                        void* where);
ANYFLASH_EXPORT anyflash::Status anyflash_run_attention_backward(
    const anyflash::Instance* instance, const anyflash::AttentionCall* call,
    const anyflash::BackwardCall* grad, const anyflash::AttentionResults* results, void* where);
ANYFLASH_EXPORT anyflash::Status anyflash_run_kvcache_append(
    const anyflash::Instance* instance, const anyflash::KVCacheCall* call,
    const anyflash::AttentionOptions* options, const anyflash::AppendResults* results, void* where);
ANYFLASH_EXPORT int64_t anyflash_attention_forward_workspace(const anyflash::Instance* instance,
                                                             const anyflash::AttentionCall* call);
ANYFLASH_EXPORT int64_t anyflash_attention_backward_workspace(
    const anyflash::Instance* instance, const anyflash::AttentionCall* call,
    const anyflash::BackwardCall* grad, const anyflash::AttentionResults* results);

// ---- Bias + activation and the fused MLP. prepare checks, describes, decides, tells; backward
// where call->dy is given, as check_fused_mlp is where call->dout is. run: core/mlp.h.
ANYFLASH_EXPORT anyflash::Status anyflash_prepare_bias_activation(
    const anyflash::BiasActivationCall* call, const anyflash::Caller* caller,
    anyflash::Choice* choice);
ANYFLASH_EXPORT anyflash::Status anyflash_run_bias_activation(
    const anyflash::Instance* instance, const anyflash::BiasActivationCall* call,
    const anyflash::BiasActivationResults* results, void* where);
ANYFLASH_EXPORT anyflash::Status anyflash_check_fused_mlp(const anyflash::MlpCall* call);
// The number of an activation's name.
ANYFLASH_EXPORT anyflash::Status anyflash_activation(const char* name, int64_t* number);

// ---- Rotary, norm and cross entropy, whose operators are kernels on a CPU. prepare checks; where
// `kernel` is not null it also finds the kernel, and refuses where there is none. run and the bytes
// of workspace: the family's header.
ANYFLASH_EXPORT anyflash::Status anyflash_prepare_rotary(const anyflash::RotaryCall* call,
                                                         const anyflash::Instance** kernel);
ANYFLASH_EXPORT anyflash::Status anyflash_run_rotary(const anyflash::Instance* instance,
                                                     const anyflash::RotaryCall* call,
                                                     const anyflash::TensorView* y, void* where);
// `grad` is null for the forward.
ANYFLASH_EXPORT anyflash::Status anyflash_prepare_norm(const anyflash::NormCall* call,
                                                       const anyflash::NormGradient* grad,
                                                       const anyflash::Instance** kernel);
ANYFLASH_EXPORT int64_t anyflash_norm_workspace(const anyflash::NormGradient* grad,
                                                const anyflash::NormResults* results);
ANYFLASH_EXPORT anyflash::Status anyflash_run_norm(const anyflash::Instance* instance,
                                                   const anyflash::NormCall* call,
                                                   const anyflash::NormGradient* grad,
                                                   const anyflash::NormResults* results,
                                                   void* where);
// The backward where call->dlosses is given.
ANYFLASH_EXPORT anyflash::Status anyflash_prepare_cross_entropy(
    const anyflash::CrossEntropyCall* call, const anyflash::Instance** kernel);
ANYFLASH_EXPORT int64_t anyflash_cross_entropy_workspace(const anyflash::CrossEntropyCall* call);
ANYFLASH_EXPORT anyflash::Status anyflash_run_cross_entropy(
    const anyflash::Instance* instance, const anyflash::CrossEntropyCall* call,
    const anyflash::CrossEntropyResults* results, void* where);

// ---- The decision for a family other than attention: describes, decides, tells.
ANYFLASH_EXPORT anyflash::Status anyflash_choose(const anyflash::TensorView* x,
                                                 anyflash::Family family,
                                                 anyflash::Direction direction,
                                                 const anyflash::Caller* caller,
                                                 anyflash::Choice* choice);

// ---- How attention is cut for a routine without masks (core/pieces.h). Writes up to `capacity`
// pieces and the rows that see a key; returns how many pieces there are.
ANYFLASH_EXPORT int64_t anyflash_plan_pieces(int64_t seqlen_q, int64_t seqlen_k,
                                             int64_t window_left, int64_t window_right,
                                             anyflash::PlanFor purpose, anyflash::Piece* pieces,
                                             int64_t capacity, int64_t* row_begin,
                                             int64_t* row_end);

// ---- The decision, for tools. `fields`: lines `name=value` of a problem, lists joined by commas.
ANYFLASH_EXPORT anyflash::Status anyflash_decide(const char* fields,
                                                 anyflash::DecisionView* decision);
// The instruction set that CPU kernels may use: this machine's, or what ANYFLASH_CPU_ISA says.
// `lowered`: this machine has more.
ANYFLASH_EXPORT anyflash::Status anyflash_environment_isa(const char** name, bool* lowered);
// ANYFLASH_CHECK=1: index tensors on a GPU are copied to the host and checked.
ANYFLASH_EXPORT bool anyflash_checks_values(void);
ANYFLASH_EXPORT const char* anyflash_route_name(anyflash::Route route);

// Where notices go instead of stderr; null for stderr again. A sink is told everything, stderr
// without ANYFLASH_VERBOSE=1 warnings alone.
ANYFLASH_EXPORT void anyflash_set_notice_sink(anyflash::NoticeSink sink);
// A notice of the warnings' level, said once.
ANYFLASH_EXPORT void anyflash_warn(const char* text);

// ---- Threads. torch_parallel_for for a torch that has none: on the OpenMP runtime that torch has
// loaded, whose GOMP_parallel this takes, so that both share their threads.
ANYFLASH_EXPORT anyflash::ParallelFor anyflash_parallel_for_by_openmp(void* gomp_parallel);

// ---- What a caller in another language compares: `name size` of every struct above, in lines.
ANYFLASH_EXPORT const char* anyflash_layout(void);
ANYFLASH_EXPORT const char* anyflash_build_compiler(void);

}  // extern "C"
