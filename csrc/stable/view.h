// Torch's tensors as the core sees them, and its answers as exceptions.
#pragma once

#include "core/interface.h"
#include "stable/aten.h"

namespace anyflash {

// For reading: a tensor whose memory is shared until somebody writes stays so.
TensorView view_of(const Tensor& tensor);
TensorView view_of(const OptionalTensor& tensor);
// For writing.
TensorView view_to_write(const Tensor& tensor);
// For int32 tensors whose values are checked: `host_copies` keeps what had to be copied from a GPU,
// which happens with ANYFLASH_CHECK=1 alone.
TensorView view_with_values(const OptionalTensor& tensor, std::vector<Tensor>& host_copies);

// `base` with the shape that the core gave its view, from where that begins on.
Tensor tensor_like(const Tensor& base, const TensorView& view);

Caller caller(int64_t backend);

// Throws what a Status other than ok says.
void check_status(Status status);

}  // namespace anyflash
