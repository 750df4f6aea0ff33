#include "stable/registrar.h"

#include <torch/csrc/stable/c/shim.h>

#include "stable/check.h"

namespace anyflash {
namespace {

// Libraries opened by one registration. Taken back unless committed; committed ones live until the
// process ends.
class Libraries {
 public:
  ~Libraries() {
    if (committed_) return;
    for (auto library = open_.rbegin(); library != open_.rend(); ++library) {
      aoti_torch_delete_library_object(*library);
    }
  }

  TorchLibraryHandle fragment(const char* name_space) {
    TorchLibraryHandle library = nullptr;
    const AOTITorchError code =
        aoti_torch_library_init_fragment(name_space, "anyflash", 0, &library);
    return keep(code, library);
  }

  TorchLibraryHandle kernels(const char* name_space, const char* dispatch_key) {
    TorchLibraryHandle library = nullptr;
    const AOTITorchError code =
        aoti_torch_library_init_impl(name_space, dispatch_key, "anyflash", 0, &library);
    return keep(code, library);
  }

  void commit() { committed_ = true; }

 private:
  TorchLibraryHandle keep(AOTITorchError code, TorchLibraryHandle library) {
    if (code != AOTI_TORCH_SUCCESS) return nullptr;
    open_.push_back(library);
    return library;
  }

  std::vector<TorchLibraryHandle> open_;
  bool committed_ = false;
};

}  // namespace

std::string register_operators(const char* name_space, const std::vector<const char*>& schemas,
                               const std::vector<Kernel>& kernels) {
  Libraries libraries;
  TorchLibraryHandle definitions = libraries.fragment(name_space);
  if (definitions == nullptr) return text("cannot open the operator library ", name_space);
  for (const char* schema : schemas) {
    if (aoti_torch_library_def(definitions, schema) != AOTI_TORCH_SUCCESS) {
      const std::string signature(schema);
      return text("already defined in this process, which goes on with that definition: ",
                  name_space, "::", signature.substr(0, signature.find('(')));
    }
  }
  for (const Kernel& kernel : kernels) {
    TorchLibraryHandle library = libraries.kernels(name_space, kernel.dispatch_key);
    if (library == nullptr || torch_library_impl(library, kernel.name, kernel.boxed,
                                                 TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) {
      return text("cannot register ", name_space, "::", kernel.name, " for ", kernel.dispatch_key);
    }
  }
  libraries.commit();
  return "";
}

}  // namespace anyflash
