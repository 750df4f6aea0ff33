#include "rowwise.h"

#include "describe.h"
#include "dispatch.h"
#include "stable/check.h"

namespace anyflash {

const Instance& rowwise_kernel(const Tensor& x, Family family, Direction direction) {
  const Problem problem = describe_rowwise(x, family, direction);
  const Choice choice = choose(problem);
  AF_CHECK(choice.route == Route::kernel, refusal(problem, decide(problem)));
  return *choice.instance;
}

}  // namespace anyflash
