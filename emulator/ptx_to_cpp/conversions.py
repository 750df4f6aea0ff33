"""Conversions between number formats (PTX ISA 9.7.9.21)."""

from __future__ import annotations

from .arithmetic import DIRECTIONS, HALVES, flushed
from .operands import C_TYPES, Operands, is_float
from .parse import SIZES, Instruction, TranslationError
from .table import instruction

_INTEGRAL = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}


@instruction("cvt")
def cvt(i: Instruction, f: Operands) -> str:
    source = i.modifiers.pop()
    target = i.modifiers.pop()
    ftz, sat = i.take("ftz") is not None, i.take("sat") is not None
    rounding = i.take("rn", "rz", "rm", "rp", "rna", *_INTEGRAL)
    if target in ("f16x2", "bf16x2"):
        return _convert_pair(i, f, target, source, rounding)
    if target == "tf32":
        if rounding != "rna":
            raise TranslationError("rounding to .tf32")
        return f.assign(i.operands[0], f"emu::fp32_to_tf32({f.value(i.operands[1], 'f32')})", "b32")
    if target not in SIZES or source not in SIZES:
        raise TranslationError(f"conversion of .{source} to .{target}")
    i.operand_count(2)
    d, a = i.operands
    real = (is_float(source) or source in HALVES, is_float(target) or target in HALVES)
    if real == (False, False):
        if sat:
            return f.assign(d, f"emu::saturate<{C_TYPES[target]}>({f.value(a, source)})", target)
        return f.assign(d, f"{C_TYPES[target]}({f.value(a, source)})", target)
    value = _widened(f, a, source) if real[0] else f.value(a, source)
    value = flushed(value, source, ftz)
    if not real[1]:
        integral = f"{_INTEGRAL[rounding]}({value})"
        return f.assign(d, f"emu::to_integer<{C_TYPES[target]}>({integral})", target)
    if rounding in _INTEGRAL:
        value = f"{_INTEGRAL[rounding]}({value})"
    if sat:
        value = f"emu::saturate_unit({value})"
    return f.assign(d, flushed(_narrowed(value, source, target, rounding), target, ftz), target)


def _widened(f: Operands, operand: str, kind: str) -> str:
    """A number of any floating-point format as float or double."""
    value = f.value(operand, kind)
    return {"f16": f"emu::fp16_to_fp32({value})", "bf16": f"emu::bf16_to_fp32({value})"}.get(
        kind, value
    )


def _narrowed(value: str, source: str, target: str, rounding: str | None) -> str:
    """A C++ number, integers included, in a floating-point format."""
    if target in HALVES:
        name = "fp16" if target == "f16" else "bf16"
        if rounding == "rz":
            return f"emu::fp32_to_{name}_toward_zero({value})"
        if source == "f32" or source in HALVES:
            return f"emu::fp32_to_{name}({value})"
        return f"emu::fp64_to_{name}(double({value}))"
    wider = SIZES[target] >= SIZES[source] and (is_float(source) or source in HALVES)
    if wider or rounding in ("rn", None, *_INTEGRAL):
        return f"{C_TYPES[target]}({value})"
    kind = C_TYPES["f32" if source in HALVES else source]
    function = f"[]({kind} a) {{ return {C_TYPES[target]}(a); }}"
    return f"emu::rounded({DIRECTIONS[rounding]}, {function}, {value})"


def _convert_pair(i: Instruction, f: Operands, target: str, source: str, rounding: str) -> str:
    """cvt.rn.bf16x2.f32 d, high, low"""
    if source != "f32" or rounding not in ("rn", "rz"):
        raise TranslationError(f"conversion of .{source} to .{target}")
    i.operand_count(3)
    relu = i.take("relu") is not None
    name = "emu::fp32_to_" + ("fp16" if target == "f16x2" else "bf16")
    if rounding == "rz":
        name += "_toward_zero"
    values = [f.value(x, "f32") for x in i.operands[1:]]
    if relu:
        values = [f"emu::max_nan({v}, 0.f)" for v in values]
    high, low = (f"{name}({v})" for v in values)
    return f.assign(i.operands[0], f"uint32_t({high}) << 16 | {low}", "b32")
