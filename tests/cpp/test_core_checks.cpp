// What the core refuses, without a tensor of torch.
#include <vector>

#include "catch.h"
#include "core/checks.h"
#include "core/interface.h"

using namespace anyflash;

namespace {

// A contiguous fp32 tensor over `memory`, from element `offset` on.
TensorView tensor(std::vector<float>& memory, std::vector<int64_t> sizes, int64_t offset = 0) {
  TensorView view;
  view.rank = static_cast<int32_t>(sizes.size());
  view.data = memory.data() + offset;
  view.host = view.data;
  view.storage_bytes = static_cast<int64_t>(memory.size() - offset) * 4;
  view.dtype = ElementType::fp32;
  int64_t stride = 1;
  for (int32_t i = view.rank - 1; i >= 0; --i) {
    view.sizes[i] = sizes[i];
    view.strides[i] = stride;
    stride *= sizes[i];
  }
  return view;
}

bool overlap(const TensorView& written, const TensorView& read) {
  try {
    check_no_overlap(written, "written", read, "read");
    return false;
  } catch (const std::runtime_error&) {
    return true;
  }
}

// The same by looking at every pair of elements.
bool overlap_by_elements(const TensorView& a, const TensorView& b) {
  std::vector<const float*> places[2];
  const TensorView* views[] = {&a, &b};
  for (int n = 0; n < 2; ++n) {
    const TensorView& x = *views[n];
    for (int64_t i = 0; i < x.numel(); ++i) {
      int64_t rest = i, at = 0;
      for (int32_t dim = x.rank - 1; dim >= 0; --dim) {
        at += rest % x.sizes[dim] * x.strides[dim];
        rest /= x.sizes[dim];
      }
      places[n].push_back(static_cast<const float*>(x.data) + at);
    }
  }
  for (const float* p : places[0]) {
    for (const float* q : places[1]) {
      if (p == q) return true;
    }
  }
  return false;
}

}  // namespace

TEST_CASE("memory is there for every element, or the tensor is refused") {
  std::vector<float> memory(24);
  TensorView x = tensor(memory, {2, 3, 4});
  REQUIRE_NOTHROW(check_allocated(x, "x"));
  x.storage_bytes -= 1;
  REQUIRE_THROWS_WITH(
      check_allocated(x, "x"),
      "x: expected allocated memory, got a tensor of shape (2, 3, 4) whose storage has 95 bytes "
      "for it (freed, or not materialised)");
  x.storage_bytes = 96;
  x.data = nullptr;
  REQUIRE_THROWS_WITH(check_allocated(x, "x"), ContainsSubstring("allocated memory"));
  x.sizes[1] = 0;
  REQUIRE_NOTHROW(check_allocated(x, "x"));
  REQUIRE_NOTHROW(check_allocated(TensorView{}, "absent"));
}

TEST_CASE("elements that share memory are not written") {
  std::vector<float> memory(64);
  TensorView x = tensor(memory, {2, 4, 4});
  REQUIRE_NOTHROW(check_no_self_overlap(x, "x"));
  std::swap(x.strides[0], x.strides[1]);
  std::swap(x.sizes[0], x.sizes[1]);
  REQUIRE_NOTHROW(check_no_self_overlap(x, "x"));
  x.strides[0] = 0;
  REQUIRE_THROWS_WITH(check_no_self_overlap(x, "x"), ContainsSubstring("expanded"));
  x.sizes[0] = 1;
  REQUIRE_NOTHROW(check_no_self_overlap(x, "x"));
}

TEST_CASE("overlap is told as by looking at every pair of elements") {
  std::vector<float> memory(4096);
  // A cache (batch, rows, heads, columns) cut from a buffer, and many views beside it.
  uint32_t state = 1;
  const auto draw = [&state](uint32_t below) {
    state = state * 1664525u + 1013904223u;
    return static_cast<int64_t>((state >> 16) % below);
  };
  int seen[2] = {};
  for (int round = 0; round < 4000; ++round) {
    TensorView written =
        tensor(memory, {1 + draw(2), 3 + draw(4), 1 + draw(2), 1 + draw(4)}, draw(64));
    const int64_t apart = 1 + draw(3);  // rows of several tensors side by side
    for (int dim = 0; dim < 3; ++dim) written.strides[dim] *= apart;
    TensorView read =
        tensor(memory, {1 + draw(2), 1 + draw(4), 1 + draw(2), 1 + draw(4)}, draw(128));
    if (draw(2) == 0) {  // the stride of a single element is anything
      for (int dim = 0; dim < 4; ++dim) {
        if (written.sizes[dim] > 1) read.strides[dim] = written.strides[dim];
      }
    }
    if (draw(4) == 0) read.strides[draw(3)] = 0;
    const bool expected = overlap_by_elements(written, read);
    INFO("round " << round);
    REQUIRE(overlap(written, read) == expected);
    ++seen[expected];
  }
  REQUIRE(seen[0] > 400);
  REQUIRE(seen[1] > 400);
}

TEST_CASE("attention is prepared without torch") {
  std::vector<float> memory(2 * 5 * 4 * 16);
  AttentionCall call;
  call.q = tensor(memory, {2, 5, 4, 16});
  call.k = call.v = tensor(memory, {2, 5, 2, 16});
  call.options.window_left = 7;  // beyond the first key: unbounded
  const Caller caller{0x3, 213};
  Choice choice;
  REQUIRE(anyflash_prepare_attention(&call, nullptr, true, &caller, &choice) == Status::ok);
  REQUIRE(choice.route == Route::math);
  REQUIRE(call.options.max_seqlen_q == 5);
  REQUIRE(call.options.window_left == -1);
  REQUIRE(call.options.window_right == 0);
  REQUIRE(call.options.purely_causal());

  call.k.sizes[2] = 3;
  REQUIRE(anyflash_prepare_attention(&call, nullptr, true, &caller, &choice) ==
          Status::runtime_error);
  REQUIRE_THAT(anyflash_text(), ContainsSubstring("expected the shape of k"));
  call.v.sizes[2] = 3;
  REQUIRE(anyflash_prepare_attention(&call, nullptr, true, &caller, &choice) ==
          Status::runtime_error);
  REQUIRE_THAT(anyflash_text(), ContainsSubstring("must divide number of heads"));

  const Caller wrong{0xF, 213};
  call.k.sizes[2] = call.v.sizes[2] = 2;
  REQUIRE(anyflash_prepare_attention(&call, nullptr, true, &wrong, &choice) == Status::value_error);
  REQUIRE_THAT(anyflash_text(), ContainsSubstring("backend: expected an order"));
}

TEST_CASE("a cache that is picked from is paged, a larger one is narrowed") {
  std::vector<float> memory(4 * 9 * 2 * 8);
  std::vector<int32_t> rows{3, 1};
  KVCacheCall call;
  call.q = tensor(memory, {2, 1, 2, 8});
  call.k_cache = call.v_cache = tensor(memory, {4, 9, 2, 8});
  REQUIRE(attention_over(call).k.size(0) == 2);
  call.cache_batch_idx.rank = 1;
  call.cache_batch_idx.data = rows.data();
  call.cache_batch_idx.sizes[0] = 2;
  call.cache_batch_idx.strides[0] = 1;
  const AttentionCall paged = attention_over(call);
  REQUIRE(paged.k.size(0) == 4);
  REQUIRE(paged.block_table.rank == 2);
  REQUIRE(paged.block_table.size(1) == 1);
}

TEST_CASE("a problem is read from text") {
  DecisionView view;
  REQUIRE(anyflash_decide("device=cpu\nisa=none\norder=math\ntorch_version=213\n", &view) ==
          Status::ok);
  REQUIRE(view.choice.route == Route::math);
  REQUIRE(anyflash_decide("op=attention\nhead_dim=x\n", &view) == Status::value_error);
  REQUIRE_THAT(anyflash_text(), ContainsSubstring("head_dim cannot be 'x'"));
  REQUIRE(anyflash_decide("colour=red\n", &view) == Status::value_error);
  REQUIRE_THAT(anyflash_text(), ContainsSubstring("unknown field 'colour'"));
}
