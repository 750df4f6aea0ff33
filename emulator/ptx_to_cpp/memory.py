"""Loads, stores, atomics, addresses, copies of a thread (PTX ISA 9.7.9, 9.7.13)."""

from __future__ import annotations

from typing import Callable

from .operands import C_TYPES, Operands, elements
from .parse import SIZES, Instruction, TranslationError
from .table import instruction

SPACES = ("global", "shared", "shared::cta", "shared::cluster", "local", "param", "const")
_PARAM_SPACES = ("param::entry", "param::func")

# How strongly a load or store is ordered. The emulator runs one thread at a time, and its order
# between threads comes from barriers alone, so plain and relaxed accesses are the same.
_STRENGTHS = ("weak", "relaxed", "acquire", "release", "volatile")
_SCOPES = ("cta", "cluster", "gpu", "sys")
# Advice to the caches.
_CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::evict_normal", "L1::evict_unchanged")
_CACHE += ("L1::evict_first", "L1::evict_last", "L1::no_allocate")
_PREFETCH = ("L2::64B", "L2::128B", "L2::256B")


def space_of(i: Instruction) -> str:
    """The state space; without one the address is generic."""
    space = i.take(*SPACES, *_PARAM_SPACES) or "generic"
    return space.split("::")[0]


def take_ordering(i: Instruction) -> None:
    i.take(*_STRENGTHS)
    i.take(*_SCOPES)
    i.take(*_CACHE)
    i.take(*_PREFETCH)


@instruction("ld")
def ld(i: Instruction, f: Operands) -> str:
    kind, space, count = _access(i, f, i.operands[0])
    constant = i.take("nc")
    i.operand_count(2)
    array = f.array_of(kind, count)
    address = f.address(i.operands[1], space)
    load = _function("ld", space + ("_nc" if constant else ""))
    size = count * SIZES[kind]
    return f"{load(address, array, size)} {f.assign_elements(i.operands[0], array, kind)}"


@instruction("st")
def st(i: Instruction, f: Operands) -> str:
    kind, space, count = _access(i, f, i.operands[1])
    i.operand_count(2)
    array, fill = f.filled(i.operands[1], kind)
    address = f.address(i.operands[0], space)
    return f"{fill} {_function('st', space)(address, array, count * SIZES[kind])}"


def _access(i: Instruction, f: Operands, data: str) -> tuple[str, str, int]:
    kind = i.type()
    space = space_of(i)
    take_ordering(i)
    count = int((i.take("v2", "v4", "v8") or "v1")[1:])
    if len(elements(data)) != count:
        raise TranslationError(f"{len(elements(data))} registers")
    return kind, space, count


def _function(direction: str, space: str) -> Callable[[str, str, int], str]:
    """Writes one access. What only its own thread can reach, and constants, need no emulator."""
    if space not in ("param", "local", "const"):
        return lambda address, v, size: f"emu::{direction}_{space}({address}, {v}, {size});"
    if direction == "ld":
        pointer = "reinterpret_cast<const void*>"
        return lambda address, v, size: f"__builtin_memcpy({v}, {pointer}({address}), {size});"
    pointer = "reinterpret_cast<void*>"
    return lambda address, v, size: f"__builtin_memcpy({pointer}({address}), {v}, {size});"


_COMBINE = {
    "add": "{old} + {b}",
    "and": "{old} & {b}",
    "or": "{old} | {b}",
    "xor": "{old} ^ {b}",
    "min": "{old} < {b} ? {old} : {b}",
    "max": "{old} > {b} ? {old} : {b}",
    "exch": "{b}",
    "cas": "{old} == {b} ? {c} : {old}",
    "inc": "{old} >= {b} ? 0 : {old} + 1",
    "dec": "{old} == 0 || {old} > {b} ? {b} : {old} - 1",
}


@instruction("atom", "red")
def atom(i: Instruction, f: Operands) -> str:
    """The emulator checks and hands out a pointer; nothing runs between the read and the write."""
    kind = i.type("b16", "b32", "b64", "u32", "s32", "u64", "s64", "f32", "f64", "f16x2", "bf16x2")
    space = space_of(i)
    take_ordering(i)
    operation = i.need(*_COMBINE)
    i.take("noftz")
    result = i.operands[0] if i.opcode == "atom" else "_"
    address, *arguments = i.operands[1:] if i.opcode == "atom" else i.operands
    count = int((i.take("v2", "v4") or "v1")[1:])
    scalar = C_TYPES[kind]
    names = dict(zip("bc", arguments))
    statements = [
        f"{scalar}* cell = static_cast<{scalar}*>"
        f"(emu::atomic_{space}({f.address(address, space)}, {count * SIZES[kind]}));"
    ]
    for n in range(count):
        values = {k: f.value(elements(x)[n], kind) for k, x in names.items()}
        statements.append(f"const {scalar} old{n} = cell[{n}];")
        statements.append(f"cell[{n}] = {_combined(operation, kind, f'old{n}', values)};")
        statements.append(f.assign(elements(result)[n] if count > 1 else result, f"old{n}", kind))
    return f"{{ {' '.join(statements)} }}"


def _combined(operation: str, kind: str, old: str, values: dict[str, str]) -> str:
    if kind in ("f16x2", "bf16x2"):
        if operation != "add":
            raise TranslationError(f".{operation} of .{kind}")
        name = "emu::Half" if kind == "f16x2" else "emu::Bfloat"
        function = "[](double a, double b) { return a + b; }"
        return f"emu::on_halves<{name}>({function}, {old}, {values['b']})"
    if operation == "cas":  # two arguments, {b} the value compared with
        return f"{old} == {values['b']} ? {values['c']} : {old}"
    return f"{C_TYPES[kind]}({_COMBINE[operation].format(old=old, **values)})"


@instruction("cvta")
def cvta(i: Instruction, f: Operands) -> str:
    i.type("u64", "u32")
    space = i.need("global", "shared", "shared::cta", "local", "const", "param", "param::entry")
    to = i.take("to") is not None
    d, a = i.operands
    value = f.value(a, "u64")
    if space.startswith("shared"):
        value = f"emu::{'generic_to_shared' if to else 'shared_to_generic'}({value})"
    return f.assign(d, value, "u64")


@instruction("prefetch")
def prefetch(i: Instruction, f: Operands) -> str:
    """Changes nothing that a program could see."""
    i.modifiers.clear()
    return ";"


@instruction("membar", "fence")
def fence(i: Instruction, f: Operands) -> str:
    """Orders one thread's accesses, which the emulator never reorders; proxies are checked."""
    i.take("sc", "acq_rel", "acquire", "release")
    proxy = i.take("proxy", "mbarrier_init")
    if proxy == "mbarrier_init":
        i.take("cluster")
        return "emu::fence_proxy_async();"
    if proxy == "proxy":
        kind = i.need("async", "tensormap::generic", "alias")
        i.take("global", "shared::cta", "shared::cluster", *_SCOPES)
        return "emu::fence_proxy_async();" if kind == "async" else ";"
    i.take("cta", "cluster", "gpu", "sys", "gl")
    return ";"
