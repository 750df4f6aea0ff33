// Nothing is silent: the first time a call does not run on the first back end of its order, the
// user is told what runs, why, and what to do. Who wants to know it also where all is well reads
// the level below.
#pragma once

#include <string>

#include "core/dispatch.h"

namespace anyflash {

enum class Level : int32_t { info = 20, warning = 30 };  // as Python's logging numbers them

// Told everything; without a sink stderr gets warnings, with ANYFLASH_VERBOSE=1 the rest too.
using NoticeSink = void (*)(int32_t level, const char* text);
void set_notice_sink(NoticeSink sink);  // null: stderr

void tell_once(Level level, const std::string& notice);

// Cheap when there is nothing new to tell: no lock, no string.
void note_choice(const Problem& problem, const Choice& choice);

}  // namespace anyflash
