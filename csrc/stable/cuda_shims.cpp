#include "stable/cuda_shims.h"

#include "core/late_symbol.h"
#include "stable/check.h"

namespace anyflash {
namespace {

constexpr const char* kLibrary = "libtorch_cuda.so";

LateSymbol<AOTITorchError(int32_t, void**)> current_stream("aoti_torch_get_current_cuda_stream",
                                                           kLibrary);
LateSymbol<AOTITorchError(int32_t, void**)> create_guard("aoti_torch_create_cuda_guard", kLibrary);
LateSymbol<AOTITorchError(void*)> delete_guard("aoti_torch_delete_cuda_guard", kLibrary);

constexpr const char* kNoCuda = "anyflash: this torch was built without CUDA";

}  // namespace

bool torch_has_cuda() {
  return current_stream.find() != nullptr && create_guard.find() != nullptr &&
         delete_guard.find() != nullptr;
}

CudaGuard::CudaGuard(int32_t device) {
  AF_CHECK(torch_has_cuda(), kNoCuda);
  check_code(create_guard.find()(device, &guard_), "device guard");
}

CudaGuard::~CudaGuard() { delete_guard.find()(guard_); }

void* current_cuda_stream(int32_t device) {
  AF_CHECK(torch_has_cuda(), kNoCuda);
  void* stream = nullptr;
  check_code(current_stream.find()(device, &stream), "current stream");
  return stream;
}

}  // namespace anyflash
