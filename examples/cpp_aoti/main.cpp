// Runs an AOTInductor package without Python: encode <encoder.pt2> <expected.pt>
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <vector>

namespace {

int run(const char* package, const char* path) {
  torch::inductor::AOTIModelPackageLoader model(package);
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  const auto expected = torch::jit::pickle_load(bytes).toGenericDict();
  const auto inputs = expected.at("inputs").toList();
  const auto outputs = expected.at("outputs").toList();

  bool equal = true;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const at::Tensor output = model.run({inputs.get(i).toTensor()})[0];
    const double difference = (output - outputs.get(i).toTensor()).abs().max().item<double>();
    std::printf("batch %d, %d rows: largest difference from Python: %.3g\n",
                static_cast<int>(output.size(0)), static_cast<int>(output.size(1)), difference);
    equal = equal && difference < 1e-5;
  }
  return equal ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s <encoder.pt2> <expected.pt>\n", argv[0]);
    return 2;
  }
  try {
    return run(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
