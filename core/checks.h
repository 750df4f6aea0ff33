// What every operator asks of its tensors. Everything here raises std::runtime_error: it names the
// argument, what came, what was expected; where the original library has a text for the case, the
// message begins with it.
#pragma once

#include <initializer_list>

#include "core/integers.h"
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

// One value per sequence, 0 or more.
void check_not_negative(const Integers& values, const char* name);
// Where packed sequences begin, and the end: none is longer than `longest`, and the end lies within
// the rows of `storage`, where that is given.
void check_cumulative(const Integers& cu, const char* name, const TensorView* storage,
                      const char* storage_name, int64_t longest, const char* longest_name);

}  // namespace anyflash
