// Awkward attention problems for kernels with tiles: every instance runs those whose features it
// has. Lengths lie around the sizes of tiles, 16 to 128; some key sequences are long enough to be
// split.
#pragma once

#include <string>
#include <vector>

#include "tests/emulated/attention_sketch.h"

namespace anyflash::emulated {

struct Case {
  std::string name;
  fuzz::Shape shape;
};

// Columns that fill a kernel's tiles, and fewer.
struct HeadDims {
  int64_t full, partial, few;
};

inline HeadDims head_dims(int64_t max_head_dim) {
  switch (max_head_dim) {
    case 64:
      return {64, 40, 8};
    case 96:
      return {96, 88, 72};
    case 128:
      return {128, 112, 104};
    case 192:
      return {192, 160, 136};
    default:
      return {256, 248, 200};
  }
}

inline void add_lengths(std::vector<Case>& cases, int64_t d) {
  cases.push_back({"one row, one key", Sketch(1, 1, d)});
  cases.push_back({"few rows, few keys", Sketch(3, 5, d)});
  cases.push_back({"one tile", Sketch(64, 64, d)});
  cases.push_back({"whole tiles", Sketch(128, 256, d)});
  cases.push_back({"one more than tiles", Sketch(129, 65, d)});
  cases.push_back({"one less than tiles", Sketch(127, 127, d).batch(2)});
  cases.push_back({"more keys", Sketch(67, 258, d)});
  cases.push_back({"more queries", Sketch(258, 67, d)});
  cases.push_back({"no keys", Sketch(5, 0, d)});
  cases.push_back({"no queries", Sketch(0, 5, d)});
  cases.push_back({"no sequences", Sketch(7, 7, d).batch(0)});
  cases.push_back({"many heads and sequences", Sketch(5, 9, d).batch(19).heads(6, 3)});
}

inline void add_masks(std::vector<Case>& cases, int64_t d) {
  cases.push_back({"causal", Sketch(131, 131, d).causal()});
  cases.push_back({"causal, whole tiles", Sketch(256, 256, d).causal().heads(1, 1)});
  cases.push_back({"causal, more keys", Sketch(67, 258, d).causal()});
  cases.push_back({"causal, rows without keys", Sketch(258, 67, d).causal()});
  cases.push_back({"window to the left", Sketch(140, 140, d).window(33, -1)});
  cases.push_back({"window to the right", Sketch(140, 150, d).window(-1, 20)});
  cases.push_back({"window to both sides", Sketch(150, 133, d).window(17, 5)});
  cases.push_back({"causal window", Sketch(200, 200, d).window(40, 0)});
  cases.push_back({"each row its key", Sketch(70, 70, d).window(0, 0)});
  cases.push_back({"window, rows without keys", Sketch(190, 70, d).window(10, 3)});
  cases.push_back({"window, keys without rows", Sketch(50, 260, d).window(30, 0)});
}

inline void add_heads(std::vector<Case>& cases, int64_t d) {
  cases.push_back({"groups of 2", Sketch(70, 90, d).heads(4, 2)});
  cases.push_back({"groups of 4", Sketch(65, 90, d).heads(8, 2).causal()});
  cases.push_back({"groups of 7", Sketch(33, 140, d).heads(7, 1)});
  cases.push_back({"groups of 8", Sketch(20, 50, d).heads(16, 2).batch(2)});
}

inline void add_features(std::vector<Case>& cases, int64_t d) {
  cases.push_back({"softcap", Sketch(80, 130, d).softcap(1.5)});
  cases.push_back({"softcap, causal", Sketch(130, 130, d).softcap(20).causal()});
  cases.push_back({"softcap, large", Sketch(80, 130, d).softcap(1000).amplitude(4)});
  cases.push_back({"softcap, large, reached", Sketch(80, 130, d).softcap(300).amplitude(12)});
  cases.push_back({"softcap, as good as none", Sketch(80, 130, d).softcap(1e6)});
  cases.push_back({"softcap, negative scale", Sketch(80, 130, d).softcap(10).scale(-0.3)});
  cases.push_back({"ALiBi by head", Sketch(90, 70, d).alibi(Slopes::heads)});
  cases.push_back({"ALiBi by head, causal", Sketch(70, 130, d).alibi(Slopes::heads).causal()});
  cases.push_back({"ALiBi by sequence", Sketch(40, 70, d).alibi(Slopes::batch_heads).batch(3)});
  cases.push_back({"ALiBi, window", Sketch(130, 99, d).alibi(Slopes::heads).window(40, 9)});
  cases.push_back({"bias", Sketch(90, 70, d).bias(BiasType::fp32).batch(2)});
  cases.push_back(
      {"bias, causal", Sketch(70, 133, d).bias(BiasType::bf16, "1hqk").causal().heads(4, 2)});
  cases.push_back({"bias, window", Sketch(140, 99, d).bias(BiasType::fp16, "11qk").window(40, 9)});
  cases.push_back({"bias by key", Sketch(90, 133, d).bias(BiasType::bf16, "b11k").batch(2)});
  cases.push_back(
      {"bias by row, sinks", Sketch(70, 66, d).bias(BiasType::fp32, "1hq1").sinks().batch(2)});
  cases.push_back({"bias of one number, sinks",
                   Sketch(70, 66, d).bias(BiasType::fp32, "b111").sinks().batch(2)});
  cases.push_back({"boolean mask", Sketch(70, 140, d).bias(BiasType::boolean, "b1qk").batch(3)});
  cases.push_back(
      {"boolean mask by key", Sketch(70, 140, d).bias(BiasType::boolean, "b11k").batch(3)});
  cases.push_back({"bias, softcap", Sketch(66, 90, d).bias(BiasType::fp32, "1hqk", 3).softcap(2)});
  cases.push_back({"bias, far, sinks", Sketch(40, 70, d)
                                           .bias(BiasType::fp32, "bhqk", 5e3)
                                           .sinks(1e4)
                                           .batch(2)
                                           .heads(4, 2)
                                           .lse_gradient()});
  cases.push_back(
      {"bias, far, causal", Sketch(70, 90, d).bias(BiasType::fp32, "1hqk", 2e4).causal()});
  cases.push_back({"bias, far, window, softcap, ALiBi", Sketch(60, 80, d)
                                                            .bias(BiasType::fp32, "bhqk", 2e4)
                                                            .softcap(1000)
                                                            .alibi(Slopes::heads)
                                                            .window(20, 9)});
  cases.push_back({"bias, least floats",
                   Sketch(70, 5, d).bias(BiasType::fp32).hidden(0.8, -3.4028234e38).batch(2)});
  cases.push_back({"bias, least halfs, few rows",
                   Sketch(64, 832, d).bias(BiasType::fp16, "11qk").hidden(1, -65504).causal()});
  cases.push_back(
      {"bias, one row", Sketch(1, 300, d).bias(BiasType::bf16, "1h1k").heads(4, 2).batch(2)});
  cases.push_back({"sinks", Sketch(66, 70, d).sinks()});
  cases.push_back({"sinks, far", Sketch(66, 70, d).sinks(3e4).heads(4, 2).lse_gradient()});
  cases.push_back({"sinks, rows without keys", Sketch(140, 66, d).sinks().causal()});
  cases.push_back({"dropout", Sketch(130, 140, d).dropout(0.17)});
  cases.push_back(
      {"dropout, causal", Sketch(75, 75, d).dropout(0.5).causal().heads(4, 2).batch(2)});
  cases.push_back({"dropout, odd lengths", Sketch(21, 133, d).dropout(0.9)});
  cases.push_back({"everything", Sketch(90, 140, d)
                                     .dropout(0.2)
                                     .softcap(5)
                                     .sinks()
                                     .heads(4, 2)
                                     .alibi(Slopes::batch_heads)
                                     .bias(BiasType::bf16)
                                     .batch(2)
                                     .window(60, 0)});
  cases.push_back({"large logits", Sketch(80, 200, d).amplitude(5)});
  cases.push_back({"large logits, causal", Sketch(130, 130, d).amplitude(5).causal()});
  cases.push_back({"scale 0", Sketch(40, 70, d).scale(0)});
  cases.push_back({"negative scale", Sketch(40, 70, d).scale(-0.2).amplitude(3)});
}

inline void add_strides(std::vector<Case>& cases, int64_t d) {
  cases.push_back({"transposed", Sketch(66, 90, d).strides(Strides::transposed).batch(2)});
  cases.push_back({"fused", Sketch(77, 77, d).strides(Strides::fused).batch(2).causal()});
  cases.push_back({"fused groups", Sketch(40, 40, d).strides(Strides::fused).heads(6, 2)});
  cases.push_back({"one key head for all", Sketch(40, 90, d).strides(Strides::broadcast)});
  cases.push_back({"gaps", Sketch(70, 90, d).strides(Strides::random).batch(2)});
  cases.push_back({"other gaps", Sketch(90, 70, d).strides(Strides::random).batch(3).causal()});
}

inline void add_packed(std::vector<Case>& cases, int64_t d) {
  const Lengths q = {1, 0, 130, 33}, k = {7, 5, 64, 133}, empty_ends = {0, 0, 65, 0};
  cases.push_back({"packed", Sketch(130, 133, d).packed(q, k)});
  cases.push_back({"packed, causal", Sketch(130, 130, d).packed(q, q).causal().heads(4, 2)});
  cases.push_back({"packed, empty at the ends", Sketch(65, 65, d).packed(empty_ends, empty_ends)});
  cases.push_back({"packed, no keys", Sketch(33, 9, d).packed({33, 2}, {0, 9})});
  cases.push_back({"packed, window", Sketch(200, 150, d).packed(q, k).window(20, 8)});
  cases.push_back({"packed, fused", Sketch(130, 130, d).packed(q, q).strides(Strides::fused)});
  cases.push_back({"packed, gaps", Sketch(130, 133, d).packed(q, k).strides(Strides::random)});
  cases.push_back({"packed, sinks", Sketch(130, 133, d).packed(q, k).sinks().causal()});
  cases.push_back(
      {"packed, ALiBi", Sketch(130, 133, d).packed(q, k).alibi(Slopes::batch_heads).causal()});
  cases.push_back({"packed, dropout", Sketch(130, 133, d).packed(q, k).dropout(0.3)});
  cases.push_back({"packed, bias", Sketch(130, 133, d).packed(q, k).bias(BiasType::fp16, "b1qk")});
  cases.push_back(
      {"packed, fewer keys used", Sketch(130, 133, d).packed(q, k).used({0, 5, 9, 70})});
}

inline void add_caches(std::vector<Case>& cases, int64_t d) {
  const Lengths used = {300, 0, 1, 129};
  cases.push_back({"keys used", Sketch(33, 200, d).used({200, 0, 77})});
  cases.push_back({"keys used, causal", Sketch(70, 200, d).used({200, 65, 7}).causal()});
  cases.push_back({"left padding", Sketch(40, 90, d).leftpad({0, 17, 90})});
  cases.push_back({"left padding, causal",
                   Sketch(70, 150, d).used({150, 99, 30}).leftpad({3, 40, 33}).causal()});
  cases.push_back({"decode", Sketch(1, 300, d).heads(8, 1).used(used)});
  cases.push_back({"decode, groups of 7", Sketch(1, 700, d).heads(7, 1)});
  cases.push_back({"decode, 5 rows", Sketch(5, 513, d).heads(4, 1).causal()});
  cases.push_back({"decode, heads of their own", Sketch(1, 300, d).heads(3, 3).batch(2)});
  cases.push_back({"decode, many rows", Sketch(16, 400, d).heads(8, 1).causal()});
  cases.push_back({"decode, split", Sketch(1, 1500, d).heads(4, 1)});
  cases.push_back({"decode, split, large logits", Sketch(2, 900, d).heads(2, 1).amplitude(5)});
  cases.push_back({"decode, split, some empty", Sketch(1, 1100, d).heads(2, 1).used({1100, 30})});
  cases.push_back({"decode, many splits", Sketch(1, 9000, d).heads(1, 1)});
  cases.push_back(
      {"decode, packed", Sketch(16, 130, d).heads(4, 1).packed({16, 1, 0, 9}, {130, 7, 5, 90})});
  cases.push_back({"decode, packed, split",
                   Sketch(3, 1100, d).heads(2, 1).packed({1, 3, 0, 2}, {700, 1100, 5, 900})});
  cases.push_back({"decode, window", Sketch(3, 900, d).heads(4, 1).window(100, 0)});
  cases.push_back({"decode, softcap, sinks", Sketch(2, 600, d).heads(4, 2).softcap(3).sinks()});
  cases.push_back(
      {"decode, softcap, large", Sketch(2, 600, d).heads(4, 2).softcap(1000).amplitude(4)});
  cases.push_back({"decode, sinks, one part", Sketch(2, 100, d).heads(4, 2).sinks()});
  cases.push_back({"decode, ALiBi", Sketch(2, 600, d).heads(4, 2).alibi(Slopes::heads).causal()});
  cases.push_back(
      {"decode, transposed", Sketch(1, 500, d).heads(4, 2).batch(2).strides(Strides::transposed)});
  cases.push_back({"pages of 16", Sketch(1, 300, d).heads(8, 1).pages(16).used(used)});
  cases.push_back({"pages of 64", Sketch(1, 300, d).heads(4, 2).pages(64).used(used)});
  cases.push_back({"pages of 256", Sketch(2, 600, d).heads(4, 1).pages(256).used({600, 255, 257})});
  cases.push_back({"pages of 1", Sketch(1, 300, d).heads(8, 1).pages(1).used({129, 0, 1, 300})});
  cases.push_back({"pages of 257", Sketch(2, 600, d).heads(4, 1).pages(257).used({600, 257, 258})});
  cases.push_back({"pages of 48", Sketch(4, 300, d).pages(48).used({300, 95}).causal()});
  cases.push_back({"pages, many rows", Sketch(100, 230, d).pages(16).used({100, 230}).causal()});
  cases.push_back({"pages of 1, many rows", Sketch(70, 132, d).pages(1).used({65, 0, 132})});
  cases.push_back({"pages of 3, many rows", Sketch(70, 230, d).pages(3).used({230, 101}).causal()});
  cases.push_back({"pages of 257, many rows", Sketch(70, 600, d).pages(257).used({600, 256, 258})});
  cases.push_back({"pages, many rows, left padding",
                   Sketch(70, 200, d).heads(4, 2).pages(7).used({200, 90, 5}).leftpad({70, 3, 5})});
  cases.push_back({"pages, window", Sketch(70, 300, d).pages(3).used({300, 150}).window(40, 0)});
  cases.push_back(
      {"pages, gaps", Sketch(70, 200, d).pages(24).used({200, 33}).strides(Strides::random)});
  cases.push_back({"pages, packed queries",
                   Sketch(70, 200, d).pages(64).used({200, 9, 66}).packed_queries({70, 0, 33})});
  cases.push_back({"pages, left padding",
                   Sketch(1, 200, d).heads(4, 2).pages(16).used({200, 50}).leftpad({70, 3})});
  cases.push_back({"pages, lengths as cu_seqlens_k", Sketch(3, 200, d).pages(16).held({33, 200})});
  cases.push_back(
      {"pages, lengths twice", Sketch(3, 200, d).pages(16).held({90, 33}).used({200, 7})});
  cases.push_back({"pages, many rows, ALiBi",
                   Sketch(90, 130, d).pages(16).used({130, 9}).alibi(Slopes::heads)});
  cases.push_back(
      {"pages, many rows, dropout", Sketch(90, 130, d).pages(64).used({130, 9}).dropout(0.4)});
  cases.push_back(
      {"pages, bias",
       Sketch(30, 130, d).pages(16).used({130, 9}).bias(BiasType::boolean, "b1qk").causal()});
  cases.push_back({"pages, everything", Sketch(20, 200, d)
                                            .heads(4, 2)
                                            .pages(64)
                                            .used({200, 90})
                                            .softcap(4)
                                            .sinks()
                                            .alibi(Slopes::heads)
                                            .dropout(0.2)
                                            .window(80, 0)});
}

// More rows to a key head than decode takes, fewer than fill tiles: heads share tiles, keys are
// cut.
inline void add_few_rows(std::vector<Case>& cases, const HeadDims& d) {
  cases.push_back({"few rows", Sketch(5, 700, d.full).heads(8, 2)});
  cases.push_back({"few rows, causal", Sketch(20, 700, d.full).heads(8, 1).causal()});
  cases.push_back({"few rows, window", Sketch(19, 900, d.full).heads(7, 1).window(300, 0)});
  cases.push_back({"few rows, one part", Sketch(30, 100, d.full).heads(8, 2).causal()});
  cases.push_back({"few rows, own heads", Sketch(40, 700, d.full).heads(2, 2).sinks()});
  cases.push_back({"few rows, some empty", Sketch(9, 900, d.full).heads(4, 2).used({900, 30})});
  cases.push_back(
      {"few rows, softcap, sinks", Sketch(9, 600, d.full).heads(4, 2).softcap(3).sinks()});
  cases.push_back(
      {"few rows, ALiBi", Sketch(20, 600, d.full).heads(4, 2).alibi(Slopes::heads).causal()});
  cases.push_back({"few rows, dropout", Sketch(20, 600, d.full).heads(4, 2).dropout(0.3)});
  cases.push_back(
      {"few rows, packed",
       Sketch(20, 700, d.full).heads(4, 1).packed({20, 1, 0, 9}, {700, 70, 5, 600}).causal()});
  cases.push_back(
      {"few rows, many sequences, packed",
       Sketch(7, 20, d.full).heads(4, 2).packed(Lengths(38, 7), Lengths(38, 20)).causal()});
  cases.push_back(
      {"few rows, pages", Sketch(9, 600, d.full).heads(4, 1).pages(32).used({600, 99})});
  cases.push_back({"few rows, fewer columns", Sketch(9, 700, d.partial).heads(8, 2)});
  cases.push_back({"few rows, few columns", Sketch(20, 700, d.few).heads(4, 1).causal()});
}

inline void add_head_dims(std::vector<Case>& cases, const HeadDims& d) {
  cases.push_back({"fewer columns", Sketch(130, 133, d.partial)});
  cases.push_back({"fewer columns, causal", Sketch(70, 130, d.partial).causal().heads(4, 2)});
  cases.push_back({"few columns", Sketch(65, 70, d.few)});
  cases.push_back({"few columns, packed", Sketch(40, 70, d.few).packed({40, 3}, {1, 70})});
  cases.push_back({"few columns, gaps", Sketch(40, 70, d.few).strides(Strides::random)});
  cases.push_back({"fewer columns of v", Sketch(70, 90, d.full).head_dim_v(d.few)});
  cases.push_back({"fewer columns of q and k", Sketch(70, 90, d.few).head_dim_v(d.full)});
  cases.push_back({"fewer columns, decode", Sketch(1, 300, d.partial).heads(4, 1)});
  cases.push_back({"few columns, decode, split", Sketch(1, 900, d.few).heads(4, 1)});
  cases.push_back({"few columns, pages", Sketch(3, 200, d.few).pages(16).used({200, 33})});
  cases.push_back({"fewer columns of v, pages",
                   Sketch(2, 200, d.full).head_dim_v(d.few).pages(16).used({200, 33})});
  if (d.full == 192) {
    cases.push_back({"128 columns of v", Sketch(140, 140, 192).head_dim_v(128).causal()});
    cases.push_back({"fewer than 128 columns of v", Sketch(70, 90, 160).head_dim_v(104)});
    cases.push_back({"128 columns of v, decode", Sketch(1, 700, 192).head_dim_v(128).heads(4, 1)});
  }
}

inline std::vector<Case> attention_cases(int64_t max_head_dim) {
  const HeadDims d = head_dims(max_head_dim);
  std::vector<Case> cases;
  add_lengths(cases, d.full);
  add_masks(cases, d.full);
  add_heads(cases, d.full);
  add_features(cases, d.full);
  add_strides(cases, d.full);
  add_packed(cases, d.full);
  add_caches(cases, d.full);
  add_few_rows(cases, d);
  add_head_dims(cases, d);
  return cases;
}

}  // namespace anyflash::emulated
