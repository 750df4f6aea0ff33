// Rows whose log-sum-exp is far from 0: as one float it says where their logits lie, and no more
// how much their weights add up to. A backward through them adds the weights up again.
#pragma once

#include "stable/aten.h"

namespace anyflash {

// Where that is so, with lse's shape; nothing where no row is far, as long as that can be told
// without waiting for a device.
OptionalTensor far_rows(const Tensor& lse);

}  // namespace anyflash
