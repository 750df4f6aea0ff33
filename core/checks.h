// Refuses what cannot be computed, before anything of torch or a kernel sees it: names the
// argument, what came, what was expected. Where the original library has a text for the case, the
// message begins with it.
#pragma once

#include "attention.h"

namespace anyflash {

constexpr int64_t kMaxHeadDim = 512;

// Shapes, dtypes, devices and options; values of index tensors on the CPU, and with
// ANYFLASH_CHECK=1 on CUDA too.
void validate_forward(const AttentionArgs& args);
void validate_backward(const AttentionArgs& args, const BackwardArgs& grad);

struct KeyNames {
  const char* k;
  const char* v;
  bool spare_rows;  // a cache may hold more sequences than q
};

// What every operator with these arguments asks for.
void check_query_and_keys(const AttentionArgs& args, const KeyNames& names, const char* direction);
void check_head_dim(const char* name, int64_t head_dim, const char* direction);
void check_window_and_scale(double softmax_scale, double softcap);
void check_same_device(const Tensor& reference, const char* reference_name, const Tensor& tensor,
                       const char* name);
void check_last_dim_contiguous(const Tensor& tensor, const char* name);
void check_alibi_slopes(const Tensor& slopes, const Tensor& q, int64_t batch, int64_t heads);
void check_sinks(const Tensor& sinks, const Tensor& q, int64_t heads);
// One int32 per entry of `shape`'s single dimension: cu_seqlens, seqused, leftpad, ...
void check_index_vector(const Tensor& tensor, const char* name, const Tensor& q, int64_t size,
                        const char* size_text);
void check_block_table(const Tensor& table, const Tensor& q, int64_t batch);

// True where the values of index tensors on q's device are to be read.
bool values_are_checked(const Tensor& q);

// An int32 tensor read on the host: in place on the CPU, else through a copy that waits for the
// device.
class HostInts {
 public:
  explicit HostInts(const Tensor& tensor);
  int64_t operator[](int64_t i) const { return data_[i]; }
  int64_t at(int64_t row, int64_t column) const { return data_[row * row_stride_ + column]; }

 private:
  Tensor tensor_;
  const int32_t* data_ = nullptr;
  int64_t row_stride_ = 0;
};

// Every page that the first `used` rows of sequence `sequence` lie on is a page of the cache.
void check_block_table_row(const HostInts& table, int64_t sequence, int64_t used, int64_t page_size,
                           int64_t num_blocks);

}  // namespace anyflash
