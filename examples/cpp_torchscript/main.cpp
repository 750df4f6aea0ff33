// Runs TorchScript models that attend over a key/value cache, without Python: generate
// <model.pt>...
#include <torch/script.h>

#include <cstdio>
#include <exception>
#include <vector>

namespace {

// The rows of the example, 30 at once and then one by one, as a language model goes through a
// prompt and its answer.
torch::Tensor in_steps(torch::jit::Module& model, const torch::Tensor& input) {
  const int64_t batch = input.size(0), seqlen = input.size(1), heads_k = 2, head_dim = 16;
  const torch::Tensor k_cache = torch::zeros({batch, seqlen + 100, heads_k, head_dim});
  const torch::Tensor v_cache = torch::zeros_like(k_cache);
  torch::Tensor cache_seqlens = torch::zeros({batch}, torch::kInt);
  std::vector<torch::Tensor> outputs;
  for (int64_t begin = 0, end = 30; begin < seqlen; begin = end++) {
    const torch::Tensor rows = input.slice(1, begin, end);
    outputs.push_back(model.forward({rows, k_cache, v_cache, cache_seqlens}).toTensor());
    cache_seqlens += end - begin;
  }
  return torch::cat(outputs, 1);
}

bool run(const char* path) {
  const torch::NoGradGuard no_grad;
  torch::jit::Module model = torch::jit::load(path);
  const torch::Tensor output = in_steps(model, model.attr("example_input").toTensor());
  const torch::Tensor expected = model.attr("example_output").toTensor();
  const double difference = (output - expected).abs().max().item<double>();
  std::printf("%s: largest difference from Python: %.3g\n", path, difference);
  return difference < 1e-5;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    bool equal = true;
    for (int i = 1; i < argc; ++i) equal = run(argv[i]) && equal;
    return equal ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
