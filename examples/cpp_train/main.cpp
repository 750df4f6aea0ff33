// Trains an attention layer in C++: train <step.pt>. The first step is compared with Python's.
#include <anyflash/attention.h>
#include <torch/torch.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

constexpr int64_t kHeads = 4, kHeadsK = 2, kHeadDim = 16, kDim = kHeads * kHeadDim;

struct Attention : torch::nn::Module {
  torch::nn::Linear qkv{nullptr}, out{nullptr};

  Attention() {
    const auto linear = [](int64_t columns) {
      return torch::nn::Linear(torch::nn::LinearOptions(kDim, columns).bias(false));
    };
    qkv = register_module("qkv", linear((kHeads + 2 * kHeadsK) * kHeadDim));
    out = register_module("out", linear(kDim));
  }

  // x (batch, seqlen, dim)
  torch::Tensor forward(const torch::Tensor& x) {
    const torch::Tensor heads = qkv->forward(x).unflatten(-1, {-1, kHeadDim});
    const auto parts = heads.split_with_sizes({kHeads, kHeadsK, kHeadsK}, 2);
    const torch::Tensor attended =
        anyflash::flash_attn_func(parts[0], parts[1], parts[2], {.causal = true});
    return out->forward(attended.flatten(2));
  }
};

// What torch.save wrote: a dict of tensors.
c10::impl::GenericDict load(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, path, ": cannot be read");
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  return torch::pickle_load(bytes).toGenericDict();
}

int run(const std::string& path) {
  const auto step = load(path);
  const auto tensor = [&step](const char* name) { return step.at(name).toTensor(); };
  Attention model;
  {
    const torch::NoGradGuard no_grad;
    model.qkv->weight.copy_(tensor("qkv_weight"));
    model.out->weight.copy_(tensor("out_weight"));
  }
  torch::optim::SGD optimizer(model.parameters(), torch::optim::SGDOptions(5.0));

  double first = 0, last = 0, difference = 0;
  for (int i = 0; i < 20; ++i) {
    optimizer.zero_grad();
    const torch::Tensor loss = torch::mse_loss(model.forward(tensor("x")), tensor("target"));
    loss.backward();
    last = loss.item<double>();
    if (i == 0) {
      first = last;
      for (const auto& [found, expected] : {std::pair{loss.detach(), tensor("loss")},
                                            {model.qkv->weight.grad(), tensor("qkv_gradient")},
                                            {model.out->weight.grad(), tensor("out_gradient")}}) {
        difference = std::max(difference, (found - expected).abs().max().item<double>());
      }
    }
    optimizer.step();
  }
  std::printf("largest difference of the first step from Python's: %.3g\n", difference);
  std::printf("loss %.4f, after 20 steps %.4f\n", first, last);
  return difference < 1e-6 && last < first ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s <step.pt>\n", argv[0]);
    return 2;
  }
  try {
    return run(argv[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
