// What the planner (forward_work.cpp, backward_work.cpp; for any CPU) and the kernels of one
// instruction set tell each other. No standard library here: its inline functions, compiled for
// AVX-512, must not end up in other objects.
#pragma once

#include "kernels/params.h"

namespace anyflash::cpu {

// One sequence of the call. Keys count from the first visible one (after leftpad_k); packed or
// dense storage begins at rows q_row and k_row of the sequence's batch entry.
struct Sequence {
  int64_t index;
  int64_t q_row;
  int64_t k_row;
  IntervalMask<int64_t> mask;

  ANYFLASH_HOST_DEVICE Sequence(const AttentionParams& p, int64_t sequence)
      : index(sequence),
        q_row(p.cu_seqlens_q ? p.cu_seqlens_q[sequence] : 0),
        mask{p.seqlen_q, 0, p.window_left, p.window_right} {
    if (p.cu_seqlens_q) mask.seqlen_q = p.cu_seqlens_q[sequence + 1] - q_row;
    const KeySpan<int64_t> keys = key_lengths(p).visible(sequence);
    k_row = keys.first;
    mask.seqlen_k = keys.length;
  }
};

// Query heads that share their keys are rows of one matrix: row = query * heads_per_row_space +
// head within the group. Then keys are converted once for all of them, and a few queries fill the
// lanes.
struct RowSpace {
  int64_t heads;  // 1 with dropout, whose bits belong to single heads

  ANYFLASH_HOST_DEVICE int64_t query(int64_t row) const { return row / heads; }
  ANYFLASH_HOST_DEVICE int64_t head(int64_t space, int64_t row) const {
    return space * heads + row % heads;
  }

  // Keys that some row of [row_begin, row_end) sees.
  ANYFLASH_HOST_DEVICE TileRange<int64_t> keys(const IntervalMask<int64_t>& mask, int64_t row_begin,
                                               int64_t row_end) const {
    const int64_t last = larger<int64_t>(0, mask.kv_end(query(row_end - 1)));
    return {mask.kv_begin(query(row_begin)), last};
  }
};

// What one thread computes at a time: rows of one row space against a range of keys.
struct Item {
  int64_t sequence;
  int64_t space;       // sequence's row spaces: [space, space + num_spaces)
  int64_t num_spaces;  // more than one in decode alone
  int64_t row_begin;
  int64_t row_end;
  int64_t key_begin;
  int64_t key_end;
  // Where the keys are split over items: this item's part of the workspace, else null. One
  // PartialRow per row, space after space.
  float* partial;
};

// A row of unfinished output: head_dim_v weighted sums of v, then the largest logit and the sum of
// the weights.
ANYFLASH_HOST_DEVICE int64_t partial_row_floats(const AttentionParams& p) {
  return p.head_dim_v + 2;
}

struct ForwardPlan {
  const AttentionParams* params;
  RowSpace rows;
};

// The first `rows` of an item's result, from the parts of all its splits.
struct Combination {
  Item item;
  int64_t splits;
  int64_t split_stride;  // floats
};

// The forward kernels of one instruction set and dtype.
struct ForwardKernels {
  int64_t item_rows;    // rows of an item at most
  int64_t decode_rows;  // a row space with fewer rows goes to `decode`
  int64_t (*scratch_bytes)(const ForwardPlan& plan);
  void (*forward)(const ForwardPlan& plan, const Item& item, char* scratch);
  bool (*can_decode)(const ForwardPlan& plan);
  int64_t (*decode_scratch_bytes)(const ForwardPlan& plan, int64_t num_spaces);
  void (*decode)(const ForwardPlan& plan, const Item& item, char* scratch);
  void (*combine)(const ForwardPlan& plan, const Combination& combination);
};

// The float accumulators of dq, a panel of rows each. The items that add to a panel, one per chunk
// of keys, each sum up their own part, and take turns in the order of the chunks at adding the sum
// of those before. A panel's memory is given back once it is in the next one's sum, so that only
// row spaces at work need any.
struct GradientPanels;

// The memory, (head_dim, panel rows), to which this thread adds until it passes the panel on:
// uninitialised at turn 0, else zeros, at the last turn the sum of the turns before, for which it
// waits.
float* wait_for_turn(GradientPanels& panels, int64_t panel, int64_t turn);
// Waits until those before have passed the panel on, and adds their sum; after the last turn there
// is nothing to do.
void pass_on(GradientPanels& panels, int64_t panel, bool last);

struct BackwardPlan {
  const AttentionParams* params;
  RowSpace rows;
  RowStatistics delta;  // sum(dout * out) - dlse
  // Where a row is far (else null): its largest score, 0 in other rows, and what the log-sum-exp is
  // more than that, in log2.
  RowStatistics reference;
  RowStatistics remainder;
  GradientPanels* panels;
};

// A chunk of keys of one key head, with the rows of all its query heads. The first chunk exists
// even where there are no keys, and writes the zeros of rows that see none.
struct BackwardItem {
  int64_t sequence;
  int64_t space;
  int64_t num_spaces;
  int64_t key_begin;  // a multiple of chunk_keys
  int64_t key_end;
  int64_t chunk_keys;
  int64_t first_panel;  // in GradientPanels, of these row spaces
};

// A tile of dbias; a dimension that broadcasts has its whole range.
struct BiasItem {
  TileRange<int64_t> sequence;
  TileRange<int64_t> head;
  TileRange<int64_t> query;
  TileRange<int64_t> key;
};

struct BackwardKernels {
  int64_t panel_rows;
  int64_t block_keys;
  int64_t (*max_chunk_keys)(const AttentionParams& params);
  int64_t (*scratch_bytes)(const BackwardPlan& plan);
  void (*backward)(const BackwardPlan& plan, const BackwardItem& item, char* scratch);
  void (*delta)(const BackwardPlan& plan, int64_t sequence, int64_t query_begin, int64_t query_end);
  void (*dsink)(const BackwardPlan& plan, int64_t head);
  int64_t (*far_rows_scratch_bytes)(const BackwardPlan& plan);
  void (*far_rows)(const BackwardPlan& plan, const Item& item, char* scratch);
  int64_t (*bias_scratch_bytes)(const BackwardPlan& plan);
  void (*dbias)(const BackwardPlan& plan, const BiasItem& item, char* scratch);
};

// Plans the work and does it on `threads` (null: the calling thread). Returns a code of launch.h.
// The plan depends on the problem alone, so that results are bitwise the same for any number of
// threads.
int32_t run(const ForwardKernels& kernels, const AttentionParams& params,
            const CpuThreads* threads);
int32_t run(const BackwardKernels& kernels, const AttentionParams& params,
            const CpuThreads* threads);

// Calls task(context, i, scratch) for every i in [0, count), each on one thread and in ascending
// order of beginning; scratch holds scratch_bytes, aligned to 64. At most `max_threads` threads.
int32_t run_parallel(const CpuThreads* threads, int64_t max_threads, int64_t count,
                     int64_t scratch_bytes, void (*task)(void* context, int64_t i, char* scratch),
                     void* context);

}  // namespace anyflash::cpu
