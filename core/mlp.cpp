#include "core/mlp.h"

#include "core/huge_pages.h"
#include "core/run.h"

namespace anyflash {

Problem describe_bias_activation(const BiasActivationCall& call, const Caller& caller) {
  const Direction direction = call.dy.given() ? Direction::backward : Direction::forward;
  return describe(call.x, Family::bias_activation, direction, caller);
}

void run_bias_activation(const Instance& instance, const BiasActivationCall& call,
                         const BiasActivationResults& results, void* where) {
  const Matrix x = matrix_of(call.x);
  BiasActivationParams params{};
  params.activation = activation_of(call.activation);
  params.x = x.data;
  params.bias = call.bias.given() ? call.bias.data : nullptr;
  params.rows = x.rows;
  params.cols = x.columns / inputs_per_output(params.activation);
  params.x_row_stride = x.stride;
  if (instance.direction == Direction::forward) {
    ask_for_huge_pages(results.y);
    params.y = results.y.data;
    params.y_row_stride = params.cols;
  } else {
    ask_for_huge_pages(results.dx);
    const Matrix dy = matrix_of(call.dy);
    params.dy = dy.data;
    params.dx = results.dx.data;
    params.dbias = results.dbias.given() ? results.dbias.data : nullptr;
    params.workspace = results.workspace;
    params.dy_row_stride = dy.stride;
    params.dx_row_stride = x.columns;
  }
  launch(instance, &params, where);
}

}  // namespace anyflash
