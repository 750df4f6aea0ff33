// Nothing is silent: the first time a call does not run on the first back end of its chain, the
// user is told what runs, why, and what to do.
#pragma once

#include "dispatch.h"

namespace anyflash {

// Cheap when there is nothing new to tell: no lock, no string.
void note_fallback(const Problem& problem, const Choice& choice);

// The line itself, also for tests: `anyflash: attention forward runs on math because ...`
std::string notice_text(const Problem& problem, const Decision& decision);

}  // namespace anyflash
