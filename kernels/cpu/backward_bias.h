// Gradients of the bias and the sinks, and the row sums that every gradient needs.
#pragma once

#include "kernels/cpu/backward_far_rows.h"

namespace anyflash::cpu::ANYFLASH_ISA {

// delta = sum(dout * out) - dlse of queries [begin, end), all heads.
template <class T>
static void delta_rows(const BackwardPlan& plan, int64_t sequence_index, int64_t begin,
                       int64_t end) {
  const AttentionParams& p = *plan.params;
  const Sequence sequence(p, sequence_index);
  const int columns = static_cast<int>(p.head_dim_v);
  for (int64_t head = 0; head < p.heads; ++head) {
    for (int64_t query = begin; query < end; ++query) {
      const T* dout = query_row<const T>(p, p.dout, sequence, query, head);
      const T* out = query_row<const T>(p, p.out, sequence, query, head);
      Float products{};
      for (int i = 0; i < columns; i += kLanes) {
        products = multiply_add(load_some(dout + i, columns - i), load_some(out + i, columns - i),
                                products);
      }
      const float dlse = p.dlse.data ? *statistic(p, p.dlse, sequence, query, head) : 0.0f;
      // A row without keys has no probabilities, whatever the gradients are.
      const bool empty = *statistic(p, p.lse, sequence, query, head) == kInfinity;
      *statistic(p, plan.delta, sequence, query, head) = empty ? 0.0f : sum(products) - dlse;
    }
  }
}

// dsink = -sum over rows of p_sink * delta. A row without keys has lse +inf and weighs nothing.
static __attribute__((noinline)) void sink_gradient(const BackwardPlan& plan, int64_t head) {
  const AttentionParams& p = *plan.params;
  const Float sink = broadcast(p.sinks[head]);
  Float total{};
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence sequence(p, b);
    const int64_t queries = sequence.mask.seqlen_q;
    for (int64_t query = 0; query < queries; query += kLanes) {
      const int count = static_cast<int>(smaller<int64_t>(kLanes, queries - query));
      const Float lse = load_some(statistic(p, p.lse, sequence, query, head), count);
      const Float delta = load_some(statistic(p, plan.delta, sequence, query, head), count);
      Float exponent = sink * kLog2e - lse * kLog2e;
      if (plan.reference.data) {
        const auto own = [&](const RowStatistics& x) __attribute__((always_inline)) {
          return load_some(statistic(p, x, sequence, query, head), count);
        };
        exponent = sink_exponent(p, sink, own(plan.reference)) - own(plan.remainder);
      }
      const Float weight = exp2<6>(exponent);
      // Lanes without a row have delta 0, but any weight.
      total = total - select(delta == Float{}, Float{}, weight * delta);
    }
  }
  p.dsinks[head] = sum(total);
}

// The gradient of a tile of the bias: an item owns at most kBlock keys x kPanel queries of dbias,
// and visits every sequence, head, query and key that these stand for. S and dP are computed once
// more, which a broadcast bias costs anyway, and no sum depends on who computes what when.
template <class T>
static void bias_item(const BackwardPlan& plan, const BiasItem& item, char* memory) {
  using Product = typename ProductOf<T>::Type::InRegisters;
  const AttentionParams& p = *plan.params;
  const int head_dim = static_cast<int>(p.head_dim), head_dim_v = static_cast<int>(p.head_dim_v);
  const int words = words_per_row<Product>(head_dim), words_v = words_per_row<Product>(head_dim_v);
  const bool one_query = p.dbias_stride[2] == 0, one_key = p.dbias_stride[3] == 0;

  Scratch scratch{memory};
  Word* k = scratch.take<Word>(kBlock * words);
  Word* v = scratch.take<Word>(kBlock * words_v);
  float* sums = scratch.take<float>(kBlock * kPanel);
  Word* staging = scratch.take<Word>(kPanel * round_up(larger(head_dim, head_dim_v), kLanes));
  const GradientTiles tiles = take_tiles<Product>(p, scratch);
  GradientPanel panel = take_panel<Product>(p, scratch);
  memset(sums, 0, sizeof(float) * kBlock * kPanel);

  const RowSpace rows_of_one_head{1};
  for (int64_t b = item.sequence.begin; b < item.sequence.end; ++b) {
    const Sequence sequence(p, b);
    const int64_t query_end = smaller(item.query.end, sequence.mask.seqlen_q);
    for (int64_t head = item.head.begin; head < item.head.end; ++head) {
      const int64_t kv_head = head / (p.heads / p.heads_k);
      for (int64_t row = item.query.begin; row < query_end; row += kPanel) {
        describe_lanes(p, rows_of_one_head, sequence, head, row, query_end, panel.lanes);
        const Lanes& lanes = panel.lanes;
        const int64_t begin = larger(item.key.begin, lanes.some.begin);
        const int64_t end = smaller(item.key.end, lanes.some.end);
        if (begin >= end) continue;
        load_panel<Product, T>(plan, rows_of_one_head, sequence, head, row, staging, panel);
        for (int64_t first = begin; first < end; first += kBlock) {
          const int count = static_cast<int>(smaller<int64_t>(kBlock, end - first));
          const T* rows[kBlock];
          find_key_rows<T>(p, p.k, sequence, kv_head, first, count, rows);
          words_along_rows<Product>(rows, count, head_dim, k);
          find_key_rows<T>(p, p.v, sequence, kv_head, first, count, rows);
          words_along_rows<Product>(rows, count, head_dim_v, v);
          const GradientBlock block{k, v, first, count};
          const float factor = score_products<Product>(p, sequence, panel, block, tiles);
          const int64_t offset = one_key ? 0 : first - item.key.begin;
          for (int key = 0; key < count; ++key) {
            for (int lane = 0; lane < lanes.vectors * kLanes; lane += kLanes) {
              const Gradient g =
                  gradient_at<Product>(p, tiles, int64_t{key} * kPanel + lane, factor,
                                       load(panel.lse + lane), load(panel.delta + lane));
              float* at = sums + (one_key ? 0 : offset + key) * kPanel + lane;
              store(at, load(at) + g.ds);
            }
          }
        }
      }
    }
  }
  float* out =
      p.dbias + item.sequence.begin * p.dbias_stride[0] + item.head.begin * p.dbias_stride[1];
  const int64_t keys = one_key ? 1 : item.key.end - item.key.begin;
  const int64_t queries = one_query ? 1 : item.query.end - item.query.begin;
  for (int64_t key = 0; key < keys; ++key) {
    for (int64_t query = 0; query < queries; ++query) {
      float total = sums[key * kPanel + query];
      if (one_query) {
        for (int lane = 1; lane < kPanel; ++lane) total += sums[key * kPanel + lane];
      }
      out[(one_query ? 0 : item.query.begin + query) * p.dbias_stride[2] +
          (one_key ? 0 : item.key.begin + key) * p.dbias_stride[3]] = total;
    }
  }
}

template <class T>
static int64_t bias_scratch_bytes(const BackwardPlan& plan) {
  using Product = typename ProductOf<T>::Type::InRegisters;
  const AttentionParams& p = *plan.params;
  const int64_t columns = round_up(p.head_dim, kLanes), columns_v = round_up(p.head_dim_v, kLanes);
  return 4 * (kBlock * (columns + columns_v + kPanel) + kPanel * larger(columns, columns_v)) +
         panel_and_tiles_bytes<Product>(p);
}

}  // namespace anyflash::cpu::ANYFLASH_ISA
