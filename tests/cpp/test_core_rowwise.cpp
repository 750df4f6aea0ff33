// What rotary, norm and cross entropy refuse.
#include <functional>
#include <vector>

#include "catch.h"
#include "core/cross_entropy.h"
#include "core/norm.h"
#include "core/rotary.h"
#include "views.h"

using namespace anyflash;
using Catch::Matchers::StartsWith;

namespace {

template <class Call>
struct Case {
  const char* message;  // "": nothing is refused
  std::function<void(Call&)> change;
};

template <class Call, class Check>
void run_cases(const std::vector<Case<Call>>& cases, const Call& good, Check check) {
  for (const Case<Call>& c : cases) {
    Call call = good;
    c.change(call);
    const std::string text = raised_by([&] { check(call); });
    INFO(c.message);
    CHECK_THAT(text, StartsWith(c.message));
    CHECK((text.empty() == (*c.message == '\0')));
  }
}

template <class T>
TensorView make_numbers(const std::vector<T>& numbers) {
  const auto dtype = sizeof(T) == 8 ? ElementType::int64 : ElementType::int32;
  TensorView view = make_view({static_cast<int64_t>(numbers.size())}, dtype);
  view.data = const_cast<T*>(numbers.data());
  view.host = numbers.data();
  return view;
}

const std::vector<int32_t> kSequences{0, 2, 5}, kLate{1, 5}, kFalling{0, 3, 2}, kBeyond{0, 6},
    kNegative{-2};
const std::vector<int64_t> kOffsets{3}, kLabels{0, 9, -100}, kBadLabels{0, 10, -100};

void pack(RotaryCall& call, const std::vector<int32_t>& sequences, int64_t max_seqlen) {
  call.x = make_view({5, 2, 8});
  call.cu_seqlens = make_numbers(sequences);
  call.max_seqlen = max_seqlen;
}

const std::vector<Case<RotaryCall>> kRotaryCases = {
    {"", [](auto&) {}},
    {"", [](auto& call) { call.cos.dtype = call.sin.dtype = ElementType::fp16; }},
    {"", [](auto& call) { pack(call, kSequences, 3); }},
    {"", [](auto& call) { call.seqlen_offsets = make_numbers(kOffsets); }},
    {"", [](auto& call) { call.seqlen_offset = 2; }},
    {"x: expected fp16, bf16, fp32 or fp64, got int32",
     [](auto& call) { call.x.dtype = ElementType::int32; }},
    {"x: expected (batch, seqlen, heads, head_dim), got (5, 2, 8)",
     [](auto& call) { call.x = make_view({5, 2, 8}); }},
    {"x: expected (total, heads, head_dim) with cu_seqlens, got (1, 5, 2, 8)",
     [](auto& call) { call.cu_seqlens = make_numbers(kSequences); }},
    {"x: expected allocated memory", [](auto& call) { call.x = freed(call.x); }},
    {"cos: expected (seqlen_rotary, rotary_dim / 2), got (7,)",
     [](auto& call) { call.cos = make_view({7}); }},
    {"sin: expected a floating dtype, got bool",
     [](auto& call) { call.sin.dtype = ElementType::boolean; }},
    {"sin: expected cos' (7, 4), got (7, 3)", [](auto& call) { call.sin = make_view({7, 3}); }},
    {"sin must be on cpu: expected cpu like x, got cuda:0",
     [](auto& call) { call.sin = on_gpu(call.sin); }},
    {"sin: expected allocated memory", [](auto& call) { call.sin = freed(call.sin); }},
    {"rotary_dim must be <= headdim, got cos with rotary_dim / 2 = 4 for x (1, 5, 2, 7)",
     [](auto& call) { call.x = make_view({1, 5, 2, 7}); }},
    {"seqlen_offsets: expected 0 or more, got -1", [](auto& call) { call.seqlen_offset = -1; }},
    {"seqlen_offsets: expected 0 or more, got -2 for sequence 0",
     [](auto& call) { call.seqlen_offsets = make_numbers(kNegative); }},
    {"seqlen_offsets: expected (batch,) = (1,), got (3,)",
     [](auto& call) { call.seqlen_offsets = make_numbers(kSequences); }},
    {"seqlen_offsets: expected int32 or int64, got fp32",
     [](auto& call) { call.seqlen_offsets = make_view({1}); }},
    {"seqlen_ro must be >= seqlen: cos and sin have 7 rows, x takes 5 from row 3 on",
     [](auto& call) { call.seqlen_offset = 3; }},
    {"seqlen_ro must be >= seqlen", [](auto& call) { call.seqlen_offset = INT64_MAX; }},
    {"cu_seqlens: expected to start at 0, got 1", [](auto& call) { pack(call, kLate, 5); }},
    {"cu_seqlens: must not decrease, got 3 and then 2 at index 2",
     [](auto& call) { pack(call, kFalling, 5); }},
    {"cu_seqlens: ends at 6, but x has 5 rows", [](auto& call) { pack(call, kBeyond, 6); }},
    {"cu_seqlens: expected (batch + 1,), got (0,)", [](auto& call) { pack(call, {}, 5); }},
    {"max_seqlen: expected at least 3, the length of sequence 1 in cu_seqlens, got 2",
     [](auto& call) { pack(call, kSequences, 2); }},
    {"max_seqlen: expected 0 or more, got -1", [](auto& call) { pack(call, kSequences, -1); }},
    {"x: is written, expected memory of its own",
     [](auto& call) {
       call.x.strides[1] = 0;
       call.in_place = true;
     }},
    {"", [](auto& call) { call.x.strides[1] = 0; }},
    {"cos: expected memory of its own",
     [](auto& call) {
       call.cos.data = call.x.data;
       call.in_place = true;
     }},
};

const std::vector<Case<NormCall>> kNormCases = {
    {"", [](auto&) {}},
    {"", [](auto& call) { call.bias = call.rowscale = call.residual = {}; }},
    {"", [](auto& call) { call.weight.dtype = ElementType::bf16; }},
    {"x: expected fp16, bf16, fp32 or fp64, got int64",
     [](auto& call) { call.x = make_view({2, 3, 8}, ElementType::int64); }},
    {"x: expected (..., columns) with at least one column, got (2, 0)",
     [](auto& call) { call.x = make_view({2, 0}); }},
    {"x: expected (..., columns) with at least one column, got ()",
     [](auto& call) { call.x = make_view({}); }},
    {"x: expected allocated memory", [](auto& call) { call.x = freed(call.x); }},
    {"weight: expected (8,), x's last dimension, got (2, 4)",
     [](auto& call) { call.weight = make_view({2, 4}); }},
    {"weight: expected fp16, bf16 or fp32 beside x of fp32, got fp64",
     [](auto& call) { call.weight = make_view({8}, ElementType::fp64); }},
    {"weight must be on cpu", [](auto& call) { call.weight = on_gpu(call.weight); }},
    {"bias: expected (8,), x's last dimension, got (1,)",
     [](auto& call) { call.bias = make_view({1}); }},
    {"bias1: expected weight1 with it", [](auto& call) { call.bias1 = make_view({8}); }},
    {"residual: expected x's shape (2, 3, 8), got (2, 8)",
     [](auto& call) { call.residual = make_view({2, 8}); }},
    {"residual: expected residual_out's dtype bf16, got fp32",
     [](auto& call) { call.residual_dtype = 2; }},
    {"residual: expected allocated memory",
     [](auto& call) { call.residual = freed(call.residual); }},
    {"rowscale: expected 6 numbers, one per row of x (2, 3, 8), got (3,)",
     [](auto& call) { call.rowscale = make_view({3}); }},
    {"rowscale is not supported with parallel LayerNorm",
     [](auto& call) { call.x1 = make_view({2, 3, 8}); }},
    {"x1: expected x's dtype fp32, got fp16",
     [](auto& call) {
       call.rowscale = {};
       call.x1 = make_view({2, 3, 8}, ElementType::fp16);
     }},
    {"dropout_mask: expected bool, got fp32", [](auto& call) { call.dropout_mask = call.x; }},
    {"dropout_mask: expected x's shape (2, 3, 8), got (3, 8)",
     [](auto& call) { call.dropout_mask = make_view({3, 8}, ElementType::boolean); }},
    {"dropout_mask1: expected one where there are x1 and dropout_mask",
     [](auto& call) { call.dropout_mask1 = make_view({2, 3, 8}, ElementType::boolean); }},
    {"dropout_p: expected a number in [0, 1), got 1", [](auto& call) { call.dropout_p = 1.0; }},
    {"out_dtype: expected 1 (fp16), 2 (bf16), 4 (fp32) or 8 (fp64), got 3",
     [](auto& call) { call.out_dtype = 3; }},
    {"out_dtype: expected fp16, bf16 or fp32 beside x of fp32, got fp64",
     [](auto& call) { call.out_dtype = 8; }},
};

const std::vector<Case<NormGradient>> kNormGradientCases = {
    {"", [](auto&) {}},
    {"", [](auto& grad) { grad.dy1 = grad.dresidual_out = {}; }},
    {"dy: expected x's shape (2, 3, 8), got (3, 8)",
     [](auto& grad) { grad.dy = make_view({3, 8}); }},
    {"dy: expected allocated memory", [](auto& grad) { grad.dy = freed(grad.dy); }},
    {"dy1: expected dy's dtype fp32, got bf16",
     [](auto& grad) { grad.dy1 = make_view({2, 3, 8}, ElementType::bf16); }},
    {"dresidual_out: expected z's dtype fp32, got fp16",
     [](auto& grad) { grad.dresidual_out = make_view({2, 3, 8}, ElementType::fp16); }},
    {"mean: expected 6 numbers, one per row of x (2, 3, 8), got (3,)",
     [](auto& grad) { grad.mean = make_view({3}); }},
    {"rstd: expected the statistics's dtype fp32, got fp16",
     [](auto& grad) { grad.rstd = make_view({6}, ElementType::fp16); }},
    {"x_dtype: expected 1 (fp16), 2 (bf16), 4 (fp32) or 8 (fp64), got 0",
     [](auto& grad) { grad.x_dtype = 0; }},
    {"rowscale is not supported with parallel", [](auto& grad) { grad.has_x1 = true; }},
};

const std::vector<Case<CrossEntropyCall>> kCrossEntropyCases = {
    {"", [](auto&) {}},
    {"", [](auto& call) { call.lse = {}; }},
    {"", [](auto& call) { call.dlosses = make_view({3}); }},
    {"",
     [](auto& call) {
       call.labels = on_gpu(call.labels), call.logits = on_gpu(call.logits),
       call.lse = on_gpu(call.lse), call.labels.host = nullptr;
     }},
    {"logits: expected fp16, bf16, fp32 or fp64, got int64",
     [](auto& call) { call.logits = make_view({3, 10}, ElementType::int64); }},
    {"logits: expected (rows, vocab) with at least one class, got (3, 0)",
     [](auto& call) { call.logits = make_view({3, 0}); }},
    {"logits: expected allocated memory", [](auto& call) { call.logits = freed(call.logits); }},
    {"labels: expected int64, got fp32", [](auto& call) { call.labels = make_view({3}); }},
    {"labels: expected (3,), one per row of logits, got (1,)",
     [](auto& call) { call.labels = make_numbers(kOffsets); }},
    {"labels: expected 0 <= label < 10 or ignore_index -100, got 10 in row 1",
     [](auto& call) { call.labels = make_numbers(kBadLabels); }},
    {"",
     [](auto& call) {  // what the backward reads has passed the forward
       call.labels = make_numbers(kBadLabels);
       call.dlosses = make_view({3});
     }},
    {"labels: expected allocated memory", [](auto& call) { call.labels = freed(call.labels); }},
    {"precomputed_lse: expected fp32, got fp64",
     [](auto& call) { call.lse = make_view({3}, ElementType::fp64); }},
    {"lse: expected (3,), one per row of logits, got (4,)",
     [](auto& call) {
       call.lse = make_view({4});
       call.dlosses = make_view({3});
     }},
    {"dlosses: expected fp32, got bf16",
     [](auto& call) { call.dlosses = make_view({3}, ElementType::bf16); }},
    {"label_smoothing: expected 0 <= it < 1, got 1", [](auto& call) { call.smoothing = 1.0; }},
    {"logit_scale: expected a positive number, got 0", [](auto& call) { call.logit_scale = 0.0; }},
    {"logit_scale: expected a positive number, got 1e-60",  // 0 as the kernel takes it
     [](auto& call) { call.logit_scale = 1e-60; }},
    {"total_classes: expected at least class_start_idx 1 + vocab 10, got 10",
     [](auto& call) { call.class_start = 1; }},
    {"logits: expected rows of neighbouring elements that do not overlap, got strides (0, 1)",
     [](auto& call) {
       call.logits.strides[0] = 0;
       call.in_place = true;
     }},
};

}  // namespace

TEST_CASE("core: what rotary refuses", "[core]") {
  RotaryCall good;
  good.x = make_view({1, 5, 2, 8});
  good.cos = make_view({7, 4});
  good.sin = make_view({7, 4});
  static char elsewhere[1 << 12];
  good.cos.data = elsewhere + 1024;
  good.sin.data = elsewhere + 2048;
  good.x.data = elsewhere + 3072;
  run_cases(kRotaryCases, good, [](const RotaryCall& call) { check_rotary(call); });
}

TEST_CASE("core: what norm refuses", "[core]") {
  NormCall good;
  good.x = good.residual = make_view({2, 3, 8});
  good.weight = good.bias = make_view({8});
  good.rowscale = make_view({2, 3});
  good.out_dtype = int64_t(Dtype::fp32);
  run_cases(kNormCases, good, [](const NormCall& call) { check_norm(call, nullptr); });
  good.weight1 = make_view({8});
  NormGradient gradient;
  gradient.dy = gradient.dy1 = gradient.dresidual_out = gradient.z = make_view({2, 3, 8});
  gradient.mean = gradient.rstd = make_view({2, 3});
  gradient.x_dtype = int64_t(Dtype::fp32);
  run_cases(kNormGradientCases, gradient,
            [&](const NormGradient& grad) { check_norm(good, &grad); });
}

TEST_CASE("core: what cross entropy refuses", "[core]") {
  CrossEntropyCall good;
  good.logits = make_view({3, 10});
  good.labels = make_numbers(kLabels);
  good.lse = make_view({3});
  good.total_classes = 10;
  run_cases(kCrossEntropyCases, good,
            [](const CrossEntropyCall& call) { check_cross_entropy(call); });
}
