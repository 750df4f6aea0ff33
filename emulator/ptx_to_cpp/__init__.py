"""Translates the PTX text of nvcc into C++ that runs on the emulator (emulator/runtime/emulator.h).

    python -m ptx_to_cpp kernel.ptx kernel.cpp

The C++ executes what nvcc emitted, inline assembly included: a register becomes a local variable, a
label a goto target, an instruction a C++ statement or a call of `emu::`. Whatever the table of this
package does not name is an error.

parse.py reads the text, operands.py knows a function's names, the modules with @instruction hold
one small handler per instruction (arithmetic, logic, conversions, memory, warp, hopper), emit.py
writes the file.
"""
