// y = activation(x + bias), and the MLP around it, as data. Shapes and semantics: csrc/schemas.def.
#pragma once

#include <string>

#include "core/describe.h"
#include "core/tensor_view.h"

namespace anyflash {

struct BiasActivationCall {
  TensorView x;            // (..., columns)
  TensorView bias;         // (columns)
  TensorView dy;           // y's shape; given for the backward
  int64_t activation = 0;  // an Activation, as the operators take it
};

// What the kernel writes, all contiguous.
struct BiasActivationResults {
  TensorView y;               // forward
  TensorView dx;              // backward: x's shape
  TensorView dbias;           // (columns); backward with a bias
  void* workspace = nullptr;  // anyflash_bias_activation_workspace() bytes; with dbias
};

struct MlpCall {
  TensorView x;        // (..., in)
  TensorView weight1;  // (hidden, in), for silu_gate (2 hidden, in)
  TensorView bias1;    // weight1's rows
  TensorView weight2;  // (out, hidden)
  TensorView bias2;    // (out)
  TensorView dout;     // (..., out); given for the backward
  TensorView hidden;   // (..., rows of weight1) or empty; given for the backward
  int64_t activation = 0;
};

// Raise std::invalid_argument (ValueError in Python) for a number or name that is none.
Activation activation_of(int64_t number);
Activation activation_of(const std::string& name);

// Columns of x per column of y.
constexpr int64_t inputs_per_output(Activation activation) {
  return activation == Activation::silu_gate ? 2 : 1;
}

// Refuse what cannot be computed: activation, shapes, dtypes, devices and memory.
void check_bias_activation(const BiasActivationCall& call);
void check_fused_mlp(const MlpCall& call);

Problem describe_bias_activation(const BiasActivationCall& call, const Caller& caller);

// Runs the kernel, in the instance's direction. `call` is checked and not empty; x and dy are
// matrices (core/run.h), the bias is contiguous. `where` is a stream or a CpuThreads.
void run_bias_activation(const Instance& instance, const BiasActivationCall& call,
                         const BiasActivationResults& results, void* where);

}  // namespace anyflash
