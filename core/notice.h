// Nothing is silent: the first time a call does not run on the first back end of its chain, the
// user is told what runs, why, and what to do. Who wants to know it also where all is well reads
// the level below.
#pragma once

#include "dispatch.h"

namespace anyflash {

enum class Level : int32_t { info = 20, warning = 30 };  // as Python's logging numbers them

// Cheap when there is nothing new to tell: no lock, no string.
void note_choice(const Problem& problem, const Choice& choice);

}  // namespace anyflash
