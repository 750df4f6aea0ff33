"""Names and operands of one function: PTX registers, scopes and addresses as C++ expressions."""

from __future__ import annotations

import math
import re
import struct
from typing import Optional

from .parse import (
    SIZES,
    BranchTargets,
    Close,
    Function,
    Label,
    Module,
    Open,
    Registers,
    TranslationError,
    Variable,
    split_operands,
)

C_TYPES = {"pred": "bool", "f32": "float", "f64": "double"}
C_TYPES.update({t: "uint16_t" for t in ("f16", "bf16")})
C_TYPES.update({t: "uint32_t" for t in ("f16x2", "bf16x2", "tf32")})
for _bits in (8, 16, 32, 64):
    C_TYPES.update({f"b{_bits}": f"uint{_bits}_t", f"u{_bits}": f"uint{_bits}_t"})
    C_TYPES[f"s{_bits}"] = f"int{_bits}_t"

SPECIAL = {
    f"%{name}.{axis}": f"emu::regs.{name}.{axis}"
    for name in ("tid", "ctaid", "ntid", "nctaid")
    for axis in "xyz"
}
SPECIAL.update(
    {
        "%laneid": "emu::laneid()",
        "%warpid": "emu::warpid()",
        "%lanemask_eq": "(1u << emu::laneid())",
        "%lanemask_lt": "((1u << emu::laneid()) - 1)",
        "%lanemask_le": "((2u << emu::laneid()) - 1)",
        "%lanemask_gt": "~((2u << emu::laneid()) - 1)",
        "%lanemask_ge": "~((1u << emu::laneid()) - 1)",
        "%cluster_ctarank": "0u",
        "%cluster_nctarank": "1u",
        "WARP_SZ": "32u",
    }
)


def is_float(name: str) -> bool:
    return C_TYPES.get(name) in ("float", "double")


def bits(name: str) -> int:
    return 8 * SIZES[name]


def unsigned(name: str) -> str:
    """The type of the same size whose arithmetic wraps."""
    return f"u{bits(name)}"


def identifier(name: str) -> str:
    return re.sub(r"\W", "_", name.lstrip("%$"))


class _Scope:
    """Between two braces: what its registers, labels and variables are called in C++."""

    def __init__(self, number: int) -> None:
        self.suffix = f"_s{number}" if number else ""
        self.registers: dict[str, str] = {}  # name to type
        self.ranges: dict[str, tuple[str, int]] = {}  # prefix of %r0, %r1, ... to type and count
        self.labels: set[str] = set()
        self.variables: dict[str, Variable] = {}
        self.targets: dict[str, list[str]] = {}


class Operands:
    """Walks through the scopes of a function in step with the emission of its statements."""

    def __init__(self, module: Module, function: Function) -> None:
        self.function = function
        self.declared: dict[str, str] = {}  # C++ local to its type, in order of appearance
        self.scratch: dict[str, tuple[str, int]] = {}  # array to type and length
        self.arrays: list[tuple[str, Variable]] = []  # .local and .param arrays
        self._module = {v.name: v for v in module.variables}
        self._functions = module.functions
        self._scopes = self._read_scopes(function)
        self._entered = 0
        self._stack = [self._scopes[0]]
        self.param_offsets, self.param_bytes = self._layout(function.params)
        self.shared, self.shared_bytes = self._shared_layout(module, function)

    # ---- scopes ----

    @staticmethod
    def _read_scopes(function: Function) -> list[_Scope]:
        scopes = [_Scope(0)]
        stack = [scopes[0]]
        for statement in function.body:
            item = statement.item
            if isinstance(item, Open):
                scopes.append(_Scope(len(scopes)))
                stack.append(scopes[-1])
            elif isinstance(item, Close):
                stack.pop()
            elif isinstance(item, Label):
                stack[-1].labels.add(item.name)
            elif isinstance(item, BranchTargets):
                stack[-1].targets[item.name] = item.labels
            elif isinstance(item, Variable):
                stack[-1].variables[item.name] = item
            elif isinstance(item, Registers):
                for name in item.names:
                    numbered = re.match(r"(.*)<(\d+)>$", name)
                    if numbered:
                        stack[-1].ranges[numbered.group(1)] = item.type, int(numbered.group(2))
                    else:
                        stack[-1].registers[name] = item.type
        return scopes

    def enter(self) -> None:
        self._entered += 1
        scope = self._scopes[self._entered]
        self._stack.append(scope)

    def leave(self) -> None:
        self._stack.pop()

    def array_of(self, kind: str, count: int, purpose: str = "v") -> str:
        """Scratch that one instruction uses and the next one uses again."""
        name = f"{purpose}_{C_TYPES[kind].replace('_t', '')}"
        _, before = self.scratch.get(name, ("", 0))
        self.scratch[name] = C_TYPES[kind], max(before, count)
        return name

    def declare(self, variable: Variable) -> None:
        """An array of the function's own."""
        if variable.space in ("local", "param"):
            self.arrays.append((identifier(variable.name) + self._stack[-1].suffix, variable))

    def label(self, name: str) -> str:
        for scope in reversed(self._stack):
            if name in scope.labels:
                return identifier(name) + scope.suffix
        raise TranslationError(f"label {name}")

    def branch_targets(self, name: str) -> list[str]:
        for scope in reversed(self._stack):
            if name in scope.targets:
                return [self.label(target) for target in scope.targets[name]]
        raise TranslationError(f"branch targets {name}")

    def register(self, name: str) -> Optional[tuple[str, str]]:
        """C++ name and PTX type."""
        numbered = re.match(r"(.*?)(\d+)$", name)
        prefix, number = (numbered.group(1), int(numbered.group(2))) if numbered else ("", 0)
        for scope in reversed(self._stack):
            kind = scope.registers.get(name)
            if kind is None:
                kind, count = scope.ranges.get(prefix, ("", 0))
                if number >= count:
                    continue
            local = identifier(name) + scope.suffix
            self.declared[local] = C_TYPES[kind]
            return local, kind
        return None

    def array(self, name: str) -> Optional[str]:
        """An array of the function's own; the parameters and results of a .func are some too."""
        for scope in reversed(self._stack):
            if name in scope.variables and scope.variables[name].space in ("local", "param"):
                return identifier(name) + scope.suffix
        own = self.function.results + ([] if self.function.entry else self.function.params)
        return identifier(name) if any(v.name == name for v in own) else None

    def callee(self, name: str) -> str:
        if not any(f.name == name for f in self._functions):
            raise TranslationError(f"call of {name}, whose body is not here")
        return identifier(name)

    def is_predicate(self, operand: str) -> bool:
        found = self.register(operand)
        return found is not None and found[1] == "pred"

    # ---- layouts ----

    @staticmethod
    def _layout(variables: list[Variable]) -> tuple[dict[str, int], int]:
        offsets, end = {}, 0
        for variable in variables:
            end = -(-end // variable.align) * variable.align
            offsets[variable.name] = end
            end += variable.bytes
        return offsets, end

    @staticmethod
    def _shared_layout(module: Module, function: Function) -> tuple[dict[str, int], int]:
        """Static variables that this function or a callee names, then the dynamic array."""
        own = [s.item for s in function.body if isinstance(s.item, Variable)]
        text = " ".join(
            getattr(s.item, "text", "")
            for f in module.functions
            if f is function or not f.entry
            for s in f.body
        )
        named = set(re.findall(r"[\w$]+", text))
        shared = [v for v in own + module.variables if v.space == "shared" and v.name in named]
        shared.sort(key=lambda v: v.extern)
        offsets, end = Operands._layout(shared)
        return offsets, end

    # ---- operands ----

    def value(self, operand: str, kind: str) -> str:
        """An operand as C++ expression of the type that `kind` has in C++."""
        target = C_TYPES[kind]
        negated = operand.startswith("!")
        operand = operand.lstrip("!").strip()
        found = self.register(operand)
        if found:
            name, declared = found
            if negated or kind == "pred":
                return f"!{name}" if negated else name
            return converted(name, C_TYPES[declared], target)
        if operand in SPECIAL:
            return converted(SPECIAL[operand], "uint32_t", target)
        number = literal(operand, target)
        if number:
            return number
        address = self.symbol(operand)
        if address:
            return converted(address, "uint64_t", target)
        raise TranslationError(f"operand {operand}")

    def symbol(self, name: str) -> Optional[str]:
        """The address of a variable."""
        if name in self.shared:
            return f"(emu::kSharedBase + {self.shared[name]})"
        if self.function.entry and name in self.param_offsets:
            return f"reinterpret_cast<uint64_t>(params + {self.param_offsets[name]})"
        array = self.array(name)
        if name in self._module and self._module[name].space in ("global", "const"):
            array = identifier(name)
        return f"reinterpret_cast<uint64_t>({array})" if array else None

    def address(self, operand: str, space: str = "") -> str:
        """`[register + offset]`; shared addresses have 32 bits, all others 64."""
        match = re.match(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]$", operand)
        if not match:
            raise TranslationError(f"address {operand}")
        base = self.value(match.group(1), "u32" if space == "shared" else "u64")
        offset = int(match.group(2) or "0", 0)
        return f"{base} + ({offset})" if offset else base

    def values(self, operand: str, kind: str) -> list[str]:
        """`{a, b}`, or the one operand."""
        return [self.value(x, kind) for x in elements(operand)]

    def assign(self, operand: str, expression: str, kind: str) -> str:
        """The statement that puts an expression of this type into a register."""
        if operand == "_":
            return f"(void)({expression});"
        found = self.register(operand)
        if not found:
            raise TranslationError(f"result {operand}")
        name, declared = found
        target, source = C_TYPES[declared], C_TYPES[kind]
        if target == source:
            return f"{name} = {expression};"
        if "float" in (source, target) or "double" in (source, target):
            return f"reinterpret_cast<{source}&>({name}) = {expression};"
        return f"{name} = {target}({source}({expression}));"

    def assign_elements(self, operand: str, array: str, kind: str) -> str:
        """`{a, b} = array[0], array[1]`"""
        names = elements(operand)
        return " ".join(self.assign(r, f"{array}[{i}]", kind) for i, r in enumerate(names))

    def filled(self, operand: str, kind: str, purpose: str = "v") -> tuple[str, str]:
        """A scratch array with `{a, b}` in it: its name and the statements that fill it."""
        values = self.values(operand, kind)
        array = self.array_of(kind, len(values), purpose)
        return array, " ".join(f"{array}[{i}] = {v};" for i, v in enumerate(values))


def elements(operand: str) -> list[str]:
    return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]


def converted(expression: str, source: str, target: str) -> str:
    """Bits stay; integers are cut or extended by their sign."""
    if source == target:
        return expression
    if "float" in (source, target) or "double" in (source, target):
        if re.match(r"[A-Za-z]\w*(\[\d+\])?$", expression):  # a variable
            return f"reinterpret_cast<{target}&>({expression})"
        return f"emu::bits_as<{target}>({expression})"
    return f"{target}({expression})"


def literal(text: str, target: str) -> Optional[str]:
    """4.5: integers, 0f and 0d bit patterns, decimal floats."""
    if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
        return _float_literal(
            struct.unpack(">f", bytes.fromhex(text[2:]))[0], text, "float", target
        )
    if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
        number = struct.unpack(">d", bytes.fromhex(text[2:]))[0]
        return _float_literal(number, text, "double", target)
    if re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
        text = text.rstrip("U")
        number = int(text, 8 if re.match(r"-?0\d", text) else 0)
        if target in ("float", "double"):
            return f"{target}({number})"
        return f"{target}({number % 2**64}ull)" if abs(number) >> 31 else f"{target}({number})"
    if re.match(r"-?\d+\.\d*(e-?\d+)?$", text) and target in ("float", "double"):
        return f"{target}({text})"
    return None


def _float_literal(number: float, text: str, source: str, target: str) -> str:
    bits_text = f"0x{text[2:]}{'u' if source == 'float' else 'ull'}"
    if target not in ("float", "double"):
        return f"{target}({bits_text})"
    if source != target:
        raise TranslationError(f"operand {text}")
    if math.isfinite(number):
        return f"{source}({number.hex()})"
    return f"emu::bits_as<{source}>({bits_text})"
