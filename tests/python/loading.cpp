// Opens libraries one after the other, then attends: loading [library]...
#include <anyflash/attention.h>
#include <dlfcn.h>

#include <cstdio>
#include <exception>

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    void* library = dlopen(argv[i], RTLD_NOW);
    if (library == nullptr) {
      std::printf("%s\n", dlerror());
      return 2;
    }
    const auto error =
        reinterpret_cast<const char* (*)()>(dlsym(library, "anyflash_register_error"));
    std::printf("library %d: '%s'\n", i, error());
  }
  const at::Tensor q = at::randn({1, 5, 2, 8}), k = at::randn({1, 5, 2, 8});
  for (const at::Tensor& v : {k, k.slice(1, 0, 3)}) {
    try {
      const at::Tensor out = anyflash::flash_attn_func(q, k, v, {.causal = true});
      const at::Tensor expected = at::scaled_dot_product_attention(
          q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), {}, 0.0, /*is_causal=*/true);
      std::printf("difference %.1g\n", (out - expected.transpose(1, 2)).abs().max().item<double>());
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
    }
  }
}
