// Runs a TorchScript model that uses anyflash, without Python: run_block <libanyflash_ops.so>
// <block.pt>
#include <dlfcn.h>
#include <torch/script.h>

#include <cstdio>
#include <exception>

namespace {

// Opening the library registers torch.ops.anyflash.*; it stays open, since the dispatcher keeps
// pointers into it.
bool load_operators(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return false;
  }
  using RegisterError = const char* (*)();
  const auto register_error =
      reinterpret_cast<RegisterError>(dlsym(library, "anyflash_register_error"));
  const char* error = register_error ? register_error() : "not an anyflash library";
  if (error != nullptr && *error != '\0') {
    std::fprintf(stderr, "%s: %s\n", path, error);
    return false;
  }
  return true;
}

int run(const char* path) {
  torch::NoGradGuard no_grad;
  torch::jit::Module model = torch::jit::load(path);
  const torch::Tensor input = model.attr("example_input").toTensor();
  const torch::Tensor expected = model.attr("example_output").toTensor();

  const torch::Tensor output = model.forward({input}).toTensor();
  const double difference = (output - expected).abs().max().item<double>();
  std::printf("largest difference from Python: %.3g\n", difference);

  // The model holds for any length.
  const torch::Tensor longer = model.forward({torch::randn({1, 301, input.size(2)})}).toTensor();
  std::printf("301 tokens: sum %.6g\n", longer.sum().item<double>());
  return difference < 1e-5 && longer.isfinite().all().item<bool>() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s <libanyflash_ops.so> <block.pt>\n", argv[0]);
    return 2;
  }
  if (!load_operators(argv[1])) return 1;
  try {
    return run(argv[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
