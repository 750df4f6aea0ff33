// Rows whose log-sum-exp is far from 0: as one float it says where their logits lie, and no more
// how much their weights add up to. The backward finds both again and keeps them apart: weights are
// exp2(exponent - reference's exponent - remainder).
#pragma once

#include "kernels/cpu/gradient_tiles.h"

namespace anyflash::cpu::ANYFLASH_ISA {

// The exponent of a sink beside a row's reference, cut where floats end.
ANYFLASH_INLINE Float sink_exponent(const AttentionParams& p, Float sink, Float reference) {
  const Float most = broadcast(3.4028235e38f);
  const Float exponent = multiply_add(-reference, broadcast(logit_scale(p)), sink) * kLog2e;
  return select(exponent < most, exponent, most);
}

// References and remainders of rows [row_begin, row_end) of a row space, a panel at most.
template <class T>
static void far_rows(const BackwardPlan& plan, const Item& item, char* memory) {
  using Product = typename ProductOf<T>::Type::InRegisters;
  const AttentionParams& p = *plan.params;
  const Sequence sequence(p, item.sequence);
  const int64_t kv_head = item.space * plan.rows.heads / (p.heads / p.heads_k);
  const int words = words_per_row<Product>(p.head_dim);
  const int count = static_cast<int>(item.row_end - item.row_begin);

  Scratch scratch{memory};
  BlockScratch block{};
  block.keys = scratch.take<Word>(kBlock * words);
  block.scores = scratch.take<float>(kBlock * kPanel);
  Word* staging = scratch.take<Word>(kPanel * round_up(p.head_dim, kLanes));
  alignas(64) float max[kPanel], sum[kPanel], maxima[kPanel], scale[kPanel];
  Panel panel{{}, scratch.take<Word>(words * kPanel), nullptr, max, sum};
  describe_lanes(p, plan.rows, sequence, item.space, item.row_begin, item.row_end, panel.lanes);
  load_queries<Product, T>(p, plan.rows, p.q, sequence, item.space, item.row_begin, count,
                           static_cast<int>(p.head_dim), staging, panel.q);
  for (int r = 0; r < kPanel; ++r) {
    max[r] = -kInfinity;
    sum[r] = 0;
  }
  bool some_far = false;
  for (int r = 0; r < count; ++r) {
    some_far |= is_far(*statistic(p, p.lse, sequence, plan.rows.query(item.row_begin + r),
                                  plan.rows.head(item.space, item.row_begin + r)));
  }
  const TileRange<int64_t>& some = panel.lanes.some;
  for (int64_t first = some.begin; some_far && first < some.end; first += kBlock) {
    const int keys = static_cast<int>(smaller<int64_t>(kBlock, some.end - first));
    const T* rows[kBlock];
    find_key_rows<T>(p, p.k, sequence, kv_head, first, keys, rows);
    words_along_rows<Product>(rows, keys, static_cast<int>(p.head_dim), block.keys);
    multiply<Product, Start::zero, true>(
        panel.lanes.vectors,
        {block.keys, words, 1, panel.q, kPanel, block.scores, kPanel, keys, words}, nullptr,
        maxima);
    finish_scores(p, panel.lanes, first, keys, block.scores, maxima);
    softmax<Fp32Product, false>(panel, block, keys, maxima, exponent_scale(p), scale);
  }
  for (int r = 0; r < count; ++r) {
    const int64_t query = plan.rows.query(item.row_begin + r);
    const int64_t head = plan.rows.head(item.space, item.row_begin + r);
    const float lse = *statistic(p, p.lse, sequence, query, head);
    float& reference = *statistic(p, plan.reference, sequence, query, head);
    float& remainder = *statistic(p, plan.remainder, sequence, query, head);
    reference = 0;
    remainder = lse * kLog2e;
    if (!is_far(lse)) continue;
    remainder = kInfinity;  // of a row without keys
    if (sum[r] == 0) continue;
    reference = max[r];
    const Exponents exponents = Exponents::of(broadcast(max[r]), exponent_scale(p));
    Float total = broadcast(sum[r]) * exp2<6>(-exponents.rounding(broadcast(max[r])));
    const float sink = p.sinks ? p.sinks[head] : -kInfinity;
    const Float exponent = sink_exponent(p, broadcast(sink), broadcast(max[r]));
    const bool sink_alone = exponent[0] > 100;  // the keys are nothing beside it
    if (!sink_alone) total = total + exp2<6>(exponent);
    const float own_remainder = sink_alone ? exponent[0] : log2(total)[0];
    // A log-sum-exp that is larger by more than rounding has other keys in it, which these are
    // nothing beside.
    const float own_lse = sink_alone ? sink : max[r] * logit_scale(p) + own_remainder * kLn2;
    const float slack = (lse < 0 ? -lse : lse) * 0x1p-12f;
    if (!(own_lse < lse - slack)) remainder = own_remainder;
  }
}

template <class T>
static int64_t far_rows_scratch_bytes(const BackwardPlan& plan) {
  using Product = typename ProductOf<T>::Type::InRegisters;
  const AttentionParams& p = *plan.params;
  const int64_t words = words_per_row<Product>(p.head_dim);
  return 4 * (kBlock * (words + kPanel) + kPanel * (words + round_up(p.head_dim, kLanes))) + 64 * 4;
}

}  // namespace anyflash::cpu::ANYFLASH_ISA
