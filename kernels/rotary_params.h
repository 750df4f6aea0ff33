// Arguments of the rotary kernels.
#pragma once

#include "kernels/portable.h"

namespace anyflash {

struct RotaryParams {
  int64_t rows;
};

}  // namespace anyflash
