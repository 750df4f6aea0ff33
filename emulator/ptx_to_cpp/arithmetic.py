"""Sums, products and functions of one lane's numbers (PTX ISA 9.7.1 to 9.7.4)."""

from __future__ import annotations

from .operands import C_TYPES, Operands, bits, is_float, unsigned
from .parse import Instruction, TranslationError
from .table import instruction

HALVES = {"f16": "emu::Half", "f16x2": "emu::Half", "bf16": "emu::Bfloat", "bf16x2": "emu::Bfloat"}
_FMA = {kind: "__builtin_fma({}, {}, {})" for kind in ("f64", *HALVES)}
_FMA["f32"] = "__builtin_fmaf({}, {}, {})"
DIRECTIONS = {"rn": "", "rz": "FE_TOWARDZERO", "rm": "FE_DOWNWARD", "rp": "FE_UPWARD"}
SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|", "xor": "^"}


def flushed(expression: str, kind: str, ftz: bool) -> str:
    return f"emu::flush({expression})" if ftz and kind == "f32" else expression


def _on_halves(kind: str, template: str, values: list[str]) -> str:
    names = "abc"[: len(values)]
    function = (
        f"[]({', '.join('double ' + n for n in names)}) {{ return {template.format(*names)}; }}"
    )
    return f"emu::on_halves<{HALVES[kind]}>({function}, {', '.join(values)})"


def _real(i: Instruction, f: Operands, kind: str, template: str) -> str:
    """A floating-point operation with a {} per operand. Modifiers: rounding, ftz, sat."""
    direction = DIRECTIONS[i.take(*DIRECTIONS) or "rn"]
    ftz, sat = i.take("ftz") is not None, i.take("sat") is not None
    i.operand_count(1 + template.count("{}"))
    values = [f.value(x, kind) for x in i.operands[1:]]
    if kind in HALVES:
        if sat or ftz or direction:
            raise TranslationError("saturation, flushing and rounding of halves")
        return f.assign(i.operands[0], _on_halves(kind, template, values), kind)
    values = [flushed(v, kind, ftz) for v in values]
    if direction:
        names = "abc"[: len(values)]
        parameters = ", ".join(f"{C_TYPES[kind]} {n}" for n in names)
        function = f"[]({parameters}) {{ return {template.format(*names)}; }}"
        result = f"emu::rounded({direction}, {function}, {', '.join(values)})"
    else:
        result = template.format(*values)
    result = flushed(result, kind, ftz)
    return f.assign(i.operands[0], f"emu::saturate_unit({result})" if sat else result, kind)


# ---- sums and products ----


@instruction("add", "sub")
def add(i: Instruction, f: Operands) -> str:
    kind = i.type()
    symbol = SYMBOLS[i.opcode]
    if is_float(kind) or kind in HALVES:
        return _real(i, f, kind, f"({{}} {symbol} {{}})")
    i.operand_count(3)
    d, a, b = i.operands
    if i.take("cc"):
        return _with_carry(i, f, kind, "0")
    if i.take("sat"):
        wide = f"__int128({f.value(a, kind)}) {symbol} __int128({f.value(b, kind)})"
        return f.assign(d, f"emu::saturate<{C_TYPES[kind]}>({wide})", kind)
    whole = unsigned(kind)
    return f.assign(d, f"{C_TYPES[whole]}({f.value(a, whole)} {symbol} {f.value(b, whole)})", whole)


@instruction("addc", "subc")
def addc(i: Instruction, f: Operands) -> str:
    kind = i.type("u32", "s32", "u64", "s64")
    i.take("cc")
    return _with_carry(i, f, kind, "carry")


def _with_carry(i: Instruction, f: Operands, kind: str, carry_in: str) -> str:
    """Sums and differences whose carry or borrow the next instruction takes (9.7.2)."""
    f.declared["carry"] = "uint32_t"
    whole, symbol = unsigned(kind), SYMBOLS[i.opcode[:3]]
    d, a, b = i.operands
    wide = (
        f"(unsigned __int128)({f.value(a, whole)}) {symbol} {f.value(b, whole)} {symbol} {carry_in}"
    )
    return (
        f"{{ const unsigned __int128 wide = {wide}; carry = uint32_t(wide >> {bits(kind)}) & 1u; "
        + f.assign(d, f"{C_TYPES[whole]}(wide)", whole)
        + " }"
    )


@instruction("mul")
def mul(i: Instruction, f: Operands) -> str:
    kind = i.type()
    if is_float(kind) or kind in HALVES:
        return _real(i, f, kind, "({} * {})")
    i.operand_count(3)
    return _product(i, f, kind, None)


@instruction("mad")
def mad(i: Instruction, f: Operands) -> str:
    kind = i.type()
    if is_float(kind):
        return _real(i, f, kind, _FMA[kind])
    i.operand_count(4)
    return _product(i, f, kind, i.operands[3])


def _product(i: Instruction, f: Operands, kind: str, addend: str | None) -> str:
    part = i.need("lo", "hi", "wide")
    d, a, b = i.operands[:3]
    if part == "lo":  # no 16-bit product may overflow an int
        whole = unsigned(kind)
        arithmetic = "uint32_t" if bits(kind) == 16 else C_TYPES[whole]
        product = f"{arithmetic}({f.value(a, whole)}) * {f.value(b, whole)}"
        total = f"{product} + {f.value(addend, whole)}" if addend else product
        return f.assign(d, f"{C_TYPES[whole]}({total})", whole)
    if bits(kind) == 64:
        wide = "__int128" if kind[0] == "s" else "unsigned __int128"
    else:
        wide = C_TYPES[kind[0] + str(2 * bits(kind))]
    product = f"{wide}({f.value(a, kind)}) * {wide}({f.value(b, kind)})"
    if wide == "unsigned __int128":
        product = f"({wide}){f.value(a, kind)} * {f.value(b, kind)}"
    if part == "hi":
        result, kind = f"{C_TYPES[unsigned(kind)]}(({product}) >> {bits(kind)})", unsigned(kind)
    else:
        kind = "u" + str(2 * bits(kind))
        result = f"{C_TYPES[kind]}({product})"
    if addend:
        result = f"{C_TYPES[kind]}({result} + {f.value(addend, kind)})"
    return f.assign(d, result, kind)


@instruction("fma")
def fma(i: Instruction, f: Operands) -> str:
    kind = i.type()
    if i.take("relu"):
        return _real(i, f, kind, f"emu::max_nan({_FMA[kind]}, 0.0)")
    return _real(i, f, kind, _FMA[kind])


@instruction("div")
def div(i: Instruction, f: Operands) -> str:
    kind = i.type()
    if is_float(kind):
        i.take("approx", "full")
        return _real(i, f, kind, "({} / {})")
    i.operand_count(3)
    d, a, b = i.operands
    return f.assign(d, f"emu::divide({f.value(a, kind)}, {f.value(b, kind)})", kind)


@instruction("rem")
def rem(i: Instruction, f: Operands) -> str:
    kind = i.type("u16", "u32", "u64", "s16", "s32", "s64")
    d, a, b = i.operands
    return f.assign(d, f"emu::remainder({f.value(a, kind)}, {f.value(b, kind)})", kind)


@instruction("neg", "abs")
def neg(i: Instruction, f: Operands) -> str:
    kind = i.type()
    d, a = i.operands
    ftz = i.take("ftz") is not None
    if kind in HALVES or is_float(kind):  # the sign bits
        whole = unsigned(kind)
        sign = f"0x{0x80008000 if kind.endswith('x2') else 1 << bits(kind) - 1:x}ull"
        value = f"{C_TYPES[whole]}({f.value(a, whole)} {'^' if i.opcode == 'neg' else '& ~'}{sign})"
        if ftz and kind == "f32":
            return f.assign(d, f"emu::flush(emu::bits_as<float>({value}))", kind)
        return f.assign(d, value, whole)
    whole = unsigned(kind)
    negated = f"{C_TYPES[whole]}(0 - {f.value(a, whole)})"
    if i.opcode == "neg":
        return f.assign(d, negated, whole)
    return f.assign(d, f"({f.value(a, kind)} < 0 ? {negated} : {f.value(a, whole)})", whole)


@instruction("min", "max")
def min_max(i: Instruction, f: Operands) -> str:
    kind = i.type()
    i.operand_count(3)
    d, a, b = i.operands
    if is_float(kind) or kind in HALVES:
        ftz = i.take("ftz") is not None
        function = f"emu::{i.opcode}_" + ("nan" if i.take("NaN") else "number")
        if kind in HALVES:
            values = [f.value(a, kind), f.value(b, kind)]
            return f.assign(d, _on_halves(kind, function + "({}, {})", values), kind)
        values = [flushed(f.value(x, kind), kind, ftz) for x in (a, b)]
        return f.assign(d, f"{function}({values[0]}, {values[1]})", kind)
    sign = "<" if i.opcode == "min" else ">"
    left, right = f.value(a, kind), f.value(b, kind)
    return f.assign(d, f"({left} {sign} {right} ? {left} : {right})", kind)


@instruction("dp4a")
def dp4a(i: Instruction, f: Operands) -> str:
    second, first = i.type("u32", "s32"), i.type("u32", "s32")
    types = ", ".join({"u32": "uint8_t", "s32": "int8_t"}[t] for t in (first, second))
    values = ", ".join(f.value(x, "u32") for x in i.operands[1:4])
    return f.assign(i.operands[0], f"emu::dot_bytes<{types}>({values})", "u32")


# ---- functions of one number ----


@instruction("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh")
def function(i: Instruction, f: Operands) -> str:
    kind = i.type("f32", "f64", "f16", "f16x2", "bf16", "bf16x2")
    i.take("approx")
    expressions = {
        "ex2": "std::exp2({})",
        "lg2": "std::log2({})",
        "rcp": "(1 / {})",
        "sqrt": "std::sqrt({})",
        "rsqrt": "emu::reciprocal_sqrt({})",
        "sin": "std::sin({})",
        "cos": "std::cos({})",
        "tanh": "std::tanh({})",
    }
    return _real(i, f, kind, expressions[i.opcode])


@instruction("copysign")
def copysign(i: Instruction, f: Operands) -> str:
    kind = i.type("f32", "f64")
    d, a, b = i.operands
    return f.assign(d, f"std::copysign({f.value(b, kind)}, {f.value(a, kind)})", kind)


@instruction("testp")
def testp(i: Instruction, f: Operands) -> str:
    kind = i.type("f32", "f64")
    tests = {
        "finite": "std::isfinite",
        "infinite": "std::isinf",
        "notanumber": "std::isnan",
        "number": "!std::isnan",
        "normal": "std::isnormal",
        "subnormal": "emu::is_subnormal",
    }
    d, a = i.operands
    return f.assign(d, f"{tests[i.need(*tests)]}({f.value(a, kind)})", "pred")
