// Registration against a libtorch that is played here: what is taken back when something fails.
#include <map>
#include <set>
#include <string>
#include <vector>

#include "catch.h"
#include "stable/registrar.h"

namespace {

struct FakeTorch {
  int opened = 0;
  std::set<int> open;
  std::map<int, std::vector<std::string>> definitions, kernels;
  std::string taken_schema, refused_kernel, refused_key;
  bool refuses_fragment = false;

  AOTITorchError add(TorchLibraryHandle* library) {
    open.insert(++opened);
    *library = reinterpret_cast<TorchLibraryHandle>(static_cast<intptr_t>(opened));
    return AOTI_TORCH_SUCCESS;
  }
};

FakeTorch fake;

int number_of(TorchLibraryHandle library) {
  return static_cast<int>(reinterpret_cast<intptr_t>(library));
}

void kernel(StableIValue*, uint64_t, uint64_t) {}

const std::vector<const char*> kSchemas = {"first(Tensor x) -> Tensor",
                                           "second(Tensor x) -> Tensor"};
const std::vector<anyflash::Kernel> kKernels = {
    {"CPU", "first", kernel}, {"CPU", "second", kernel}, {"CUDA", "first", kernel}};

std::string register_with(FakeTorch torch) {
  fake = torch;
  return anyflash::register_operators("lib", kSchemas, kKernels);
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_library_init_fragment(const char*, const char*, uint32_t,
                                                TorchLibraryHandle* library) {
  return fake.refuses_fragment ? AOTI_TORCH_FAILURE : fake.add(library);
}

AOTITorchError aoti_torch_library_init_impl(const char*, const char* key, const char*, uint32_t,
                                            TorchLibraryHandle* library) {
  return key == fake.refused_key ? AOTI_TORCH_FAILURE : fake.add(library);
}

AOTITorchError aoti_torch_library_def(TorchLibraryHandle library, const char* schema) {
  if (schema == fake.taken_schema) return AOTI_TORCH_FAILURE;
  fake.definitions[number_of(library)].push_back(schema);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_library_impl(TorchLibraryHandle library, const char* name,
                                  void (*)(StableIValue*, uint64_t, uint64_t), uint64_t) {
  if (name == fake.refused_kernel) return AOTI_TORCH_FAILURE;
  fake.kernels[number_of(library)].push_back(name);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle library) {
  fake.open.erase(number_of(library));
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"

TEST_CASE("registration defines every schema, adds every kernel and keeps the libraries open") {
  CHECK(register_with({}) == "");
  CHECK(fake.definitions[1].size() == kSchemas.size());
  CHECK(fake.kernels.size() == kKernels.size());
  CHECK(fake.open.size() == 1 + kKernels.size());
}

TEST_CASE("an operator that exists already is named, and nothing stays behind") {
  FakeTorch torch;
  torch.taken_schema = kSchemas[1];
  CHECK(register_with(torch) ==
        "already defined in this process, which goes on with that definition: lib::second");
  CHECK(fake.kernels.empty());
  CHECK(fake.open.empty());
}

TEST_CASE("a kernel that is refused takes the definitions back") {
  FakeTorch torch;
  torch.refused_kernel = "second";
  CHECK(register_with(torch) == "cannot register lib::second for CPU");
  CHECK(fake.open.empty());
}

TEST_CASE("a dispatch key that is refused takes the definitions back") {
  FakeTorch torch;
  torch.refused_key = "CUDA";
  CHECK(register_with(torch) == "cannot register lib::first for CUDA");
  CHECK(fake.open.empty());
}

TEST_CASE("a library that cannot be opened is said") {
  FakeTorch torch;
  torch.refuses_fragment = true;
  CHECK(register_with(torch) == "cannot open the operator library lib");
}
