// What went wrong, collected until take_result().
#pragma once

#include "emulator/runtime/emulator.h"

namespace emu {

#define EMU_SITE __builtin_return_address(0)  // the place in the kernel, in a function it calls

// One report per kind and place, counted; what, in the manner of printf. `site` may be null.
void report(const char* kind, const void* site, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

// Source lines of a code address, innermost first; empty if unknown.
const std::string& source_lines(const void* site);
void forget_source_lines();  // a library may have been loaded where another was

// "anyflash::sm80::forward_kernel<64>" of the mangled name of a kernel with parameters.
std::string short_name(const char* mangled);

extern Result result;  // so far

}  // namespace emu
