// The checks that attention and its form with a cache have in common.
#pragma once

#include "core/attention.h"
#include "core/checks.h"

namespace anyflash {

struct KeyNames {
  const char* k;
  const char* v;
  bool spare_rows;  // a cache may hold more sequences than q
};

void check_query_and_keys(const AttentionCall& call, const KeyNames& names, const char* direction);
void check_window_and_scale(const AttentionOptions& options);
void check_alibi_slopes(const TensorView& slopes, const TensorView& q, int64_t batch,
                        int64_t heads);
void check_sinks(const TensorView& sinks, const TensorView& q, int64_t heads);
void check_block_table(const TensorView& table, const TensorView& q, int64_t batch);

// Every page that the first `used` rows of sequence `sequence` lie on is a page of the cache.
void check_block_table_row(const Integers& table, int64_t sequence, int64_t used, int64_t page_size,
                           int64_t num_blocks);

// Whether the values of all given tensors can be read here.
bool are_readable(std::initializer_list<const TensorView*> tensors);

}  // namespace anyflash
