"""A module as one C++ file."""

from __future__ import annotations

from . import arithmetic, conversions, hopper, logic, memory, warp  # noqa: F401  (fill the table)
from .operands import C_TYPES, Operands, identifier, literal
from .parse import (
    Close,
    Function,
    Instruction,
    Label,
    Module,
    Open,
    Position,
    Statement,
    TranslationError,
    Variable,
)
from .table import HANDLERS

_PREAMBLE = """// Translated from PTX by emulator/ptx_to_cpp.
#include "emulator/runtime/emulator.h"
#include "emulator/runtime/lane_math.h"

namespace {
"""


def translate(module: Module, name: str) -> str:
    """C++ of a module; `name` is the PTX file's, for error messages."""
    entries = [f for f in module.functions if f.entry]
    helpers = [f for f in module.functions if not f.entry]
    parts = [_PREAMBLE]
    parts += [_variable(v) for v in module.variables if v.space in ("global", "const")]
    parts += [f"{_signature(f)};" for f in helpers]
    for function in [*helpers, *entries]:
        parts.append(_Body(module, function, name).text())
    parts.append("}  // namespace\n")
    return "\n".join(parts)


def _variable(variable: Variable) -> str:
    if variable.extern:
        raise TranslationError(f"external variable {variable.name}")
    kind = C_TYPES[variable.type]
    values = ", ".join(literal(v, kind) for v in variable.values)
    array = f"{kind} {identifier(variable.name)}[{max(variable.count, 1)}]"
    return f"alignas({variable.align}) {array} = {{{values}}};"


def _signature(function: Function) -> str:
    if function.entry:
        return f"void {identifier(function.name)}(const unsigned char* params)"
    arrays = [f"unsigned char* {identifier(v.name)}" for v in function.results + function.params]
    return f"void {identifier(function.name)}({', '.join(arrays)})"


class _Body:
    """The statements of one function. Those of a source line are one C++ line, after a #line."""

    def __init__(self, module: Module, function: Function, name: str) -> None:
        self._function = function
        self._name = name
        self._operands = Operands(module, function)
        self._lines: list[str] = []
        self._position: Position | None = None

    def text(self) -> str:
        for statement in self._function.body:
            try:
                code = self._statement(statement)
            except (TranslationError, ValueError) as error:
                text = getattr(statement.item, "text", "")
                at = statement.position
                place = f" (from {at.file}:{at.line})" if at else ""
                raise TranslationError(
                    f"{self._name}:{statement.line}: {error}: {text}{place}"
                ) from None
            if code:
                self._append(code, statement.position)
        self._lines.append('#line 1 "translated"')
        declared = [f"{kind} {name};" for name, kind in self._operands.declared.items()]
        for name, (kind, count) in self._operands.scratch.items():
            declared.append(f"{kind} {name}[{count}];")
        for name, variable in self._operands.arrays:
            declared.append(f"alignas({variable.align}) unsigned char {name}[{variable.bytes}];")
            declared.append(f"std::memset({name}, 0xFF, sizeof {name});")
        lines = [_signature(self._function) + " {", *declared, *self._lines, "}"]
        if self._function.entry:
            lines.append(self._registration())
        return "\n".join(lines)

    def _append(self, code: str, position: Position | None) -> None:
        if position != self._position and position:
            self._position = position
            self._lines.append(f'#line {position.line} "{position.file}"\n{code}')
        elif self._lines:
            self._lines[-1] += " " + code
        else:
            self._lines.append(code)

    def _statement(self, statement: Statement) -> str:
        item, operands = statement.item, self._operands
        if isinstance(item, Open):
            operands.enter()
            return ""
        if isinstance(item, Close):
            operands.leave()
            return ""
        if isinstance(item, Label):
            return f"{operands.label(item.name)}:;"
        if isinstance(item, Variable):
            operands.declare(item)
            return ""
        if not isinstance(item, Instruction):
            return ""
        handler = HANDLERS.get(item.opcode)
        if handler is None:
            raise TranslationError("unknown instruction")
        code = handler(item, operands)
        if item.modifiers:
            raise TranslationError(f"unknown modifier .{item.modifiers[0]}")
        if item.guard:
            return f"if ({operands.value(item.guard, 'pred')}) {{ {code} }}"
        return code

    def _registration(self) -> str:
        function, operands = self._function, self._operands
        parameters = [f"{{{operands.param_offsets[v.name]}, {v.bytes}}}" for v in function.params]
        fields = [
            f'"{function.name}"',
            identifier(function.name),
            f"{{{', '.join(parameters)}}}",
            str(operands.shared_bytes),
            str(function.max_threads),
        ]
        return (
            f"[[maybe_unused]] const int registered_{identifier(function.name)} = "
            f"emu::register_kernel({{{', '.join(fields)}}});"
        )
