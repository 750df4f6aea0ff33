// libstdc++'s archive calls this function of glibc 2.18, which registers the destructor of a
// thread_local. Older systems have none: there such an object is not destroyed with its thread.
#include <dlfcn.h>

namespace {
using Register = int (*)(void (*destroy)(void*), void* object, void* library);
}

extern "C" __attribute__((visibility("hidden"))) int __cxa_thread_atexit_impl(
    void (*destroy)(void*), void* object, void* library) {
  static const auto system =
      reinterpret_cast<Register>(dlsym(RTLD_DEFAULT, "__cxa_thread_atexit_impl"));
  return system != nullptr ? system(destroy, object, library) : 0;
}
