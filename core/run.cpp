#include "core/run.h"

#include "core/text.h"

namespace anyflash {

void launch(const Instance& instance, const void* params, void* where) {
  const int32_t error = anyflash_launch(&instance, params, where);
  AF_CHECK(error == 0, "anyflash: ", instance.name, " failed: ", anyflash_error_string(error));
}

}  // namespace anyflash
