// Symbols that cannot be linked: those of the CUDA driver, of a newer torch than the target, and of
// libtorch_cuda.so, which a CPU build of torch does not have, and which in Python lies outside the
// scope of a library that needs only libtorch_cpu.so.
#pragma once

#include <dlfcn.h>

#include <atomic>

namespace anyflash {

template <class Function>
class LateSymbol {
 public:
  explicit constexpr LateSymbol(const char* name, const char* library = nullptr)
      : name_(name), library_(library) {}

  // Null where the symbol is missing. Only a hit is kept: a C++ program may load libtorch_cuda.so
  // later.
  Function* find() {
    Function* found = found_.load(std::memory_order_relaxed);
    if (found != nullptr) return found;
    void* symbol = dlsym(RTLD_DEFAULT, name_);
    if (symbol == nullptr && library_ != nullptr) {
      void* handle = dlopen(library_, RTLD_NOLOAD | RTLD_LAZY);
      if (handle != nullptr) symbol = dlsym(handle, name_);
    }
    found = reinterpret_cast<Function*>(symbol);
    found_.store(found, std::memory_order_relaxed);
    return found;
  }

 private:
  const char* name_;
  const char* library_;
  std::atomic<Function*> found_{nullptr};
};

}  // namespace anyflash
