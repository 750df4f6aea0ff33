#include "emulator/runtime/fiber.h"

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace emu {

// The return address is popped and jumped to: a `ret` would be mispredicted at every switch.
asm(R"(
.text
.p2align 4
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %r8
  jmpq *%r8
.size emu_switch,.-emu_switch
)");

namespace {

constexpr int kMaxStacks = 1024;
constexpr size_t kStackBytes = 1024 * 1024;
constexpr size_t kGuardBytes = 64 * 1024;
constexpr int kSavedRegisters = 6;

// Memory that exists once it is touched; the lowest part of every stack faults.
char* allocate_stacks() {
  void* memory = mmap(nullptr, kMaxStacks * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  char* stacks = static_cast<char*>(memory);
  for (int i = 0; i < kMaxStacks; ++i) mprotect(stacks + i * kStackBytes, kGuardBytes, PROT_NONE);
  return stacks;
}

char* stacks() {
  static char* const memory = allocate_stacks();
  return memory;
}

}  // namespace

StackPointer prepare_stack(int index, void (*entry)()) {
  // Tops at different cache lines: equal ones would all compete for the same cache sets.
  const size_t stagger = size_t(index % 61) * 320;
  void** top = reinterpret_cast<void**>(stacks() + (index + 1) * kStackBytes - stagger);
  top -= 3;  // at its first instruction a function finds the stack pointer 8 modulo 16
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  return top;
}

bool on_stack(const void* address) {
  const uintptr_t offset =
      reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(stacks());
  return offset < kMaxStacks * kStackBytes;
}

}  // namespace emu
