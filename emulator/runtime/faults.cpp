#include "emulator/runtime/faults.h"

#include <ucontext.h>

#include <cstdio>

#include "emulator/runtime/fiber.h"
#include "emulator/runtime/global_memory.h"
#include "emulator/runtime/report.h"

namespace emu {

namespace {

uint64_t fault_address;

void report_fault() {
  EMU_FAIL("out-of-bounds", last_global_site, "access to unmapped address %#lx",
           static_cast<unsigned long>(fault_address));
}

// A thread of a kernel goes on in report_fault; any other fault is the program's own.
void on_fault(int number, siginfo_t* info, void* context) {
  const bool stack_overflow = on_stack(info->si_addr);  // leaves no place to go on
  if (!self || stack_overflow) {
    if (stack_overflow) fputs("emulator: a kernel needs more stack than kStackBytes\n", stderr);
    signal(number, SIG_DFL);
    return;
  }
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  fault_address = reinterpret_cast<uint64_t>(info->si_addr);
  const greg_t below_red_zone = registers[REG_RSP] - 256;
  registers[REG_RSP] = (below_red_zone & ~greg_t{15}) - 8;  // as if called
  registers[REG_RIP] = reinterpret_cast<greg_t>(report_fault);
}

}  // namespace

FaultHandler::FaultHandler() {
  static char memory[64 * 1024];
  stack_t stack = {};
  stack.ss_sp = memory;
  stack.ss_size = sizeof memory;
  sigaltstack(&stack, &earlier_stack_);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &earlier_segv_);
  sigaction(SIGBUS, &action, &earlier_bus_);
}

FaultHandler::~FaultHandler() {
  sigaction(SIGBUS, &earlier_bus_, nullptr);
  sigaction(SIGSEGV, &earlier_segv_, nullptr);
  sigaltstack(&earlier_stack_, nullptr);
}

}  // namespace emu
