"""Bits, comparison, selection and moves (PTX ISA 9.7.1, 9.7.5 to 9.7.9)."""

from __future__ import annotations

from .arithmetic import HALVES, SYMBOLS, flushed
from .operands import C_TYPES, Operands, bits, elements, is_float, unsigned
from .parse import Instruction, TranslationError
from .table import instruction

# ---- bits ----


@instruction("and", "or", "xor")
def logic(i: Instruction, f: Operands) -> str:
    kind = i.type("pred", "b16", "b32", "b64")
    i.operand_count(3)
    d, a, b = i.operands
    symbol = SYMBOLS[i.opcode]
    return f.assign(d, f"{C_TYPES[kind]}({f.value(a, kind)} {symbol} {f.value(b, kind)})", kind)


@instruction("not")
def not_(i: Instruction, f: Operands) -> str:
    kind = i.type("pred", "b16", "b32", "b64")
    d, a = i.operands
    if kind == "pred":
        return f.assign(d, f"!{f.value(a, kind)}", kind)
    return f.assign(d, f"{C_TYPES[kind]}(~{f.value(a, kind)})", kind)


@instruction("cnot")
def cnot(i: Instruction, f: Operands) -> str:
    kind = i.type("b16", "b32", "b64")
    d, a = i.operands
    return f.assign(d, f"{C_TYPES[kind]}({f.value(a, kind)} == 0)", kind)


@instruction("shl", "shr")
def shift(i: Instruction, f: Operands) -> str:
    kind = i.type()
    d, a, count = i.operands
    if kind[0] not in "bus":
        raise TranslationError(f"type .{kind}")
    if count.isdigit() and int(count) < bits(kind):
        symbol = "<<" if i.opcode == "shl" else ">>"
        return f.assign(d, f"{C_TYPES[kind]}({f.value(a, kind)} {symbol} {count})", kind)
    name = "emu::shift_left" if i.opcode == "shl" else "emu::shift_right"
    return f.assign(d, f"{name}({f.value(a, kind)}, {f.value(count, 'u32')})", kind)


@instruction("shf")
def funnel_shift(i: Instruction, f: Operands) -> str:
    i.type("b32")
    left = i.need("l", "r") == "l"
    count = f.value(i.operands[3], "u32")
    count = (
        f"({count} & 31)" if i.need("wrap", "clamp") == "wrap" else f"({count} < 32 ? {count} : 32)"
    )
    d, a, b = i.operands[:3]
    name = "emu::funnel_left" if left else "emu::funnel_right"
    return f.assign(d, f"{name}({f.value(a, 'b32')}, {f.value(b, 'b32')}, {count})", "b32")


@instruction("popc", "clz", "brev", "bfind")
def count_bits(i: Instruction, f: Operands) -> str:
    kind = i.type("b32", "b64", "u32", "s32", "u64", "s64")
    d, a = i.operands
    value = f.value(a, kind)
    if i.opcode == "popc":
        return f.assign(d, f"uint32_t(__builtin_popcountll({value}))", "u32")
    if i.opcode == "clz":
        return f.assign(d, f"emu::leading_zeros({value})", "u32")
    if i.opcode == "brev":
        return f.assign(d, f"emu::reverse_bits({value})", kind)
    if i.take("shiftamt"):
        return f.assign(d, f"emu::distance_to_top({value})", "u32")
    return f.assign(d, f"emu::find_highest({value})", "u32")


@instruction("bfe")
def bfe(i: Instruction, f: Operands) -> str:
    kind = i.type("u32", "s32", "u64", "s64")
    d, a, position, length = i.operands
    fields = f"{f.value(position, 'u32')}, {f.value(length, 'u32')}"
    return f.assign(d, f"emu::extract_field({f.value(a, kind)}, {fields})", kind)


@instruction("bfi")
def bfi(i: Instruction, f: Operands) -> str:
    kind = i.type("b32", "b64")
    d, a, b, position, length = i.operands
    fields = f"{f.value(position, 'u32')}, {f.value(length, 'u32')}"
    return f.assign(d, f"emu::insert_field({f.value(a, kind)}, {f.value(b, kind)}, {fields})", kind)


@instruction("prmt")
def prmt(i: Instruction, f: Operands) -> str:
    i.type("b32")
    values = ", ".join(f.value(x, "b32") for x in i.operands[1:])
    i.operand_count(4)
    return f.assign(i.operands[0], f"emu::permute_bytes({values})", "b32")


@instruction("lop3")
def lop3(i: Instruction, f: Operands) -> str:
    i.type("b32")
    i.operand_count(5)
    d, a, b, c, table = i.operands
    values = ", ".join(f.value(x, "b32") for x in (a, b, c))
    return f.assign(d, f"emu::logic3<{int(table, 0)}>({values})", "b32")


# ---- comparison and selection ----

_ORDERED = {"eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_ORDERED.update({"lo": "<", "ls": "<=", "hi": ">", "hs": ">="})  # of unsigned integers
_UNORDERED = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}


def _comparison(i: Instruction, f: Operands, kind: str, a: str, b: str) -> str:
    """9.3.1: with a NaN, the ordered comparisons are false and the unordered ones true."""
    test = i.need("ne", "num", "nan", *_ORDERED, *_UNORDERED)
    ftz = i.take("ftz") is not None
    if kind in HALVES:
        if kind.endswith("x2"):
            raise TranslationError("comparison of pairs")
        wide = "emu::fp16_to_fp32" if kind == "f16" else "emu::bf16_to_fp32"
        left, right = (f"{wide}({f.value(x, kind)})" for x in (a, b))
    else:
        left, right = (flushed(f.value(x, kind), kind, ftz) for x in (a, b))
    real = is_float(kind) or kind in HALVES
    if test in _ORDERED:
        return f"({left} {_ORDERED[test]} {right})"
    if test == "ne":
        return f"({left} < {right} || {left} > {right})" if real else f"({left} != {right})"
    if test in ("num", "nan"):
        return f"({'!' if test == 'num' else ''}__builtin_isunordered({left}, {right}))"
    if test == "equ":
        return f"!({left} < {right} || {left} > {right})"
    return f"!({left} {_UNORDERED[test]} {right})"


@instruction("setp")
def setp(i: Instruction, f: Operands) -> str:
    kind = i.type()
    combine = i.take("and", "or", "xor")
    results = i.operands[0].split("|")
    i.operand_count(4 if combine else 3)
    test = _comparison(i, f, kind, *i.operands[1:3])
    if combine is None:
        positive, negative = test, f"!{test}"
    else:
        other = f.value(i.operands[3], "pred")
        positive = f"bool({test} {SYMBOLS[combine]} {other})"
        negative = f"bool(!{test} {SYMBOLS[combine]} {other})"
    if len(results) == 1:
        return f.assign(results[0], positive, "pred")
    first, second = f.assign(results[0], "first", "pred"), f.assign(results[1], "second", "pred")
    return f"{{ const bool first = {positive}, second = {negative}; {first} {second} }}"


@instruction("set")
def set_(i: Instruction, f: Operands) -> str:
    kind = i.type()
    result = i.type("u32", "s32", "f32")
    combine = i.take("and", "or", "xor")
    test = _comparison(i, f, kind, *i.operands[1:3])
    if combine:
        test = f"bool({test} {SYMBOLS[combine]} {f.value(i.operands[3], 'pred')})"
    true = "1.f" if result == "f32" else f"{C_TYPES[result]}(-1)"
    return f.assign(i.operands[0], f"({test} ? {true} : {C_TYPES[result]}(0))", result)


@instruction("selp")
def selp(i: Instruction, f: Operands) -> str:
    kind = i.type()
    d, a, b, predicate = i.operands
    return f.assign(
        d, f"({f.value(predicate, 'pred')} ? {f.value(a, kind)} : {f.value(b, kind)})", kind
    )


@instruction("slct")
def slct(i: Instruction, f: Operands) -> str:
    selector, kind = i.type("s32", "f32"), i.type()
    i.take("ftz")  # a subnormal number below 0 counts as -0 then
    d, a, b, c = i.operands
    return f.assign(
        d, f"({f.value(c, selector)} >= 0 ? {f.value(a, kind)} : {f.value(b, kind)})", kind
    )


# ---- moves ----


@instruction("mov")
def mov(i: Instruction, f: Operands) -> str:
    kind = i.type()
    d, a = i.operands
    if d.startswith("{"):
        parts = elements(d)
        width = bits(kind) // len(parts)
        words = [f"uint{width}_t(whole >> {width * n})" for n in range(len(parts))]
        assigned = " ".join(f.assign(p, w, f"b{width}") for p, w in zip(parts, words))
        whole = f.value(a, unsigned(kind))
        return f"{{ const uint{bits(kind)}_t whole = {whole}; {assigned} }}"
    if a.startswith("{"):
        parts = elements(a)
        width, whole = bits(kind) // len(parts), f"uint{bits(kind)}_t"
        words = [f"{whole}({f.value(p, f'b{width}')}) << {width * n}" for n, p in enumerate(parts)]
        return f.assign(d, f"{whole}({' | '.join(words)})", unsigned(kind))
    return f.assign(d, f.value(a, kind), kind)
