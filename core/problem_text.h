// A problem as text, for tools: one `name=value` per line.
#pragma once

#include <string>

#include "core/problem.h"

namespace anyflash {

// op, device, sm, driver, isa, isa_lowered (0 or 1), direction, dtype, head_dim, head_dim_v,
// features (names joined by commas), torch_version, order, explicit (0 or 1). Raises
// std::invalid_argument for a name or value that is none.
Problem parse_problem(const std::string& lines);

}  // namespace anyflash
