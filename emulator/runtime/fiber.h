// Stacks that one OS thread switches between. A switch saves what a called function must preserve
// (System V x86-64), costs about 3 ns and knows no signals, exceptions or floating-point modes.
#pragma once

namespace emu {

using StackPointer = void*;

// Saves the running stack in `from` and continues on `to`.
extern "C" void emu_switch(StackPointer* from, StackPointer to);

// The stack number `index` of a pool that grows, made to call `entry`, which must never return.
StackPointer prepare_stack(int index, void (*entry)());

// Does the address belong to one of the stacks?
bool on_stack(const void* address);

}  // namespace emu
