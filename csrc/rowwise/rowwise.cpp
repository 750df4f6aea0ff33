#include "rowwise/rowwise.h"

#include "stable/view.h"

namespace anyflash {

const Instance& rowwise_kernel(const Tensor& x, Family family, Direction direction) {
  const TensorView view = view_of(x);
  const Caller from = caller(static_cast<int64_t>(BackEnd::kernel));
  Choice choice;
  check_status(anyflash_choose(&view, family, direction, &from, &choice));
  return *choice.instance;
}

}  // namespace anyflash
