// What every operator asks of its tensors. Everything here raises std::runtime_error: it names the
// argument, what came, what was expected; where the original library has a text for the case, the
// message begins with it.
#pragma once

#include <initializer_list>

#include "core/text.h"

namespace anyflash {

bool has_shape(const TensorView& tensor, std::initializer_list<int64_t> expected);

// The one door from a tensor to its pointer: memory for every element is there. Absent tensors
// pass.
void check_allocated(const TensorView& tensor, const char* name);

// No two elements of `tensor` share memory, as what is written must not.
void check_no_self_overlap(const TensorView& tensor, const char* name);
// No element of `read` lies in `written`, whose elements do not share memory.
void check_no_overlap(const TensorView& written, const char* written_name, const TensorView& read,
                      const char* read_name);

void check_same_device(const TensorView& reference, const char* reference_name,
                       const TensorView& tensor, const char* name);
void check_last_dim_contiguous(const TensorView& tensor, const char* name);

// One int32 per entry of a single dimension of `size`: cu_seqlens, seqused, leftpad, ...
void check_index_vector(const TensorView& tensor, const char* name, const TensorView& q,
                        int64_t size, const char* size_text);

// An int32 tensor of one or two dimensions, read on the host.
class HostInts {
 public:
  explicit HostInts(const TensorView& tensor)
      : data_(static_cast<const int32_t*>(tensor.host)),
        row_stride_(tensor.device == Device::cpu ? tensor.strides[0] : tensor.sizes[1]) {}
  int64_t operator[](int64_t i) const { return data_[i]; }
  int64_t at(int64_t row, int64_t column) const { return data_[row * row_stride_ + column]; }

 private:
  const int32_t* data_;
  int64_t row_stride_;  // read for two dimensions alone
};

}  // namespace anyflash
