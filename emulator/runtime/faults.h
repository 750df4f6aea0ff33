// Accesses to unmapped memory.
#pragma once

#include <signal.h>

namespace emu {

// While it lives, such an access by a thread is a report and the end of the launch. Only during
// launches: test frameworks have handlers of their own.
class FaultHandler {
 public:
  FaultHandler();
  ~FaultHandler();
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;

 private:
  stack_t earlier_stack_;
  struct sigaction earlier_segv_, earlier_bus_;
};

}  // namespace emu
