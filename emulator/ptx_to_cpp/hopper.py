"""sm_90: mbarriers, bulk copies, warpgroups (PTX ISA 9.7.9.25, 9.7.13.15, 9.7.15)."""

from __future__ import annotations

import re

from .operands import Operands, elements
from .parse import Instruction, TranslationError, split_operands
from .table import instruction
from .warp import cp_async

_COMPLETION = "mbarrier::complete_tx::bytes"


@instruction("mbarrier")
def mbarrier(i: Instruction, f: Operands) -> str:
    i.take("b64")
    action = i.need("init", "inval", "arrive", "expect_tx", "try_wait", "test_wait")
    i.take("release", "acquire", "relaxed")
    i.take("cta", "cluster")
    i.take("shared", "shared::cta")
    if action in ("init", "inval"):
        count = f", {f.value(i.operands[1], 'u32')}" if action == "init" else ""
        return f"emu::mbarrier_{action}({f.address(i.operands[0], 'shared')}{count});"
    if action == "expect_tx":
        address, count = i.operands
        return f"emu::mbarrier_expect_tx({f.address(address, 'shared')}, {f.value(count, 'u32')});"
    if action == "arrive":
        name = "emu::mbarrier_arrive" + ("_expect_tx" if i.take("expect_tx") else "")
        state, address, *count = i.operands
        inputs = [f.address(address, "shared"), *(f.value(x, "u32") for x in count)]
        if state != "_":
            raise TranslationError("the state of an mbarrier: wait for a parity instead")
        return f"{name}({', '.join(inputs)});"
    i.need("parity")
    predicate, address, parity, *_ = i.operands  # a hint of time may follow
    inputs = f"{f.address(address, 'shared')}, {f.value(parity, 'u32')}"
    if action == "test_wait":
        return f.assign(predicate, f"emu::mbarrier_test_wait({inputs})", "pred")
    return f"emu::mbarrier_wait({inputs}); {f.assign(predicate, 'true', 'pred')}"


# ---- copies ----


@instruction("cp")
def cp(i: Instruction, f: Operands) -> str:
    if i.take("reduce"):
        i.need("async")
        i.need("bulk")
        return _reduce(i, f)
    i.need("async")
    return _bulk(i, f) if i.take("bulk") else cp_async(i, f)


def _bulk(i: Instruction, f: Operands) -> str:
    if i.take("commit_group"):
        return "emu::bulk_commit();"
    if i.take("wait_group"):
        name = "emu::bulk_wait" + ("_read" if i.take("read") else "")
        return f"{name}({int(i.operands[0], 0)});"
    if i.take("prefetch"):
        i.modifiers.clear()
        return ";"
    tensor, rank = _tensor(i)
    i.take("tile")
    hint = i.take("L2::cache_hint") is not None
    if _direction(i) == "load":
        i.need(_COMPLETION)
        i.operand_count(3 + (not tensor) + hint)
        if tensor:
            shared, source, barrier = i.operands[:3]
            where = f"{f.address(shared, 'shared')}, {f.address(barrier, 'shared')}"
            return _with_map(f, source, rank, f"emu::tma_load(map, {where}, at);")
        shared, source, size, barrier = i.operands[:4]
        where = f"{f.address(shared, 'shared')}, {f.address(source)}, {f.value(size, 'u32')}"
        return f"emu::bulk_load({where}, {f.address(barrier, 'shared')});"
    i.need("bulk_group")
    i.operand_count(2 + (not tensor) + hint)
    if tensor:
        target, shared = i.operands[:2]
        call = f"emu::tma_store(map, {f.address(shared, 'shared')}, at);"
        return _with_map(f, target, rank, call)
    target, shared, size = i.operands[:3]
    where = f"{f.address(target)}, {f.address(shared, 'shared')}, {f.value(size, 'u32')}"
    return f"emu::bulk_store({where});"


def _reduce(i: Instruction, f: Operands) -> str:
    tensor, rank = _tensor(i)
    i.take("tile")
    i.take("L2::cache_hint")
    if _direction(i) != "store":
        raise TranslationError("reduction into shared memory")
    i.need("bulk_group")
    i.need("add")
    if tensor:
        target, shared = i.operands[:2]
        call = f"emu::tma_reduce_add(map, {f.address(shared, 'shared')}, at);"
        return _with_map(f, target, rank, call)
    i.need("f32")
    target, shared, size = i.operands[:3]
    where = f"{f.address(target)}, {f.address(shared, 'shared')}, {f.value(size, 'u32')}"
    return f"emu::bulk_reduce_add({where});"


def _tensor(i: Instruction) -> tuple[bool, int]:
    if not i.take("tensor"):
        return False, 0
    return True, int(i.need("1d", "2d", "3d", "4d", "5d")[0])


def _direction(i: Instruction) -> str:
    """The first of the two state spaces is the destination."""
    spaces = ("global", "shared::cta", "shared::cluster")
    first, second = i.need(*spaces), i.need(*spaces)
    if (first == "global") == (second == "global"):
        raise TranslationError("copy within a state space")
    return "store" if first == "global" else "load"


def _with_map(f: Operands, operand: str, rank: int, call: str) -> str:
    """`[map, {x, y}]`"""
    match = re.match(r"\[\s*([^\s,]+)\s*,\s*\{(.*)\}\s*\]$", operand, re.S)
    if not match:
        raise TranslationError(f"tensor {operand}")
    coordinates = [f.value(x, "s32") for x in split_operands(match.group(2))]
    if len(coordinates) != rank:
        raise TranslationError(f"{len(coordinates)} coordinates")
    pointer = f"reinterpret_cast<const emu::TensorMap*>({f.value(match.group(1), 'u64')})"
    at = f"const int32_t at[5] = {{{', '.join(coordinates)}}};"
    return f"{{ const auto* map = {pointer}; {at} {call} }}"


# ---- warpgroups ----


@instruction("wgmma")
def wgmma(i: Instruction, f: Operands) -> str:
    if i.take("fence", "commit_group", "wait_group") is None:
        return _mma_async(i, f)
    call = i.text.split(".")[1]
    i.need("sync")
    i.need("aligned")
    if call == "wait_group":
        return f"emu::wgmma_wait({int(i.operands[0], 0)});"
    return {"fence": "emu::wgmma_fence();", "commit_group": "emu::wgmma_commit();"}[call]


def _mma_async(i: Instruction, f: Operands) -> str:
    for modifier in ("mma_async", "sync", "aligned"):
        i.need(modifier)
    shape, accumulator, kind, second = i.modifiers
    match = re.match(r"m64n(\d+)k16$", shape)
    if not match or accumulator != "f32" or kind != second or kind not in ("f16", "bf16"):
        raise TranslationError("shape or types of wgmma")
    i.modifiers.clear()
    n = int(match.group(1))
    from_registers = i.operands[1].startswith("{")
    i.operand_count(7 if from_registers else 8)
    d, a, b, scale_d, scale_a, scale_b, *transposed = i.operands
    if len(elements(d)) != n // 2:
        raise TranslationError(f"{len(elements(d))} accumulators")
    if from_registers:
        transposed = ["0", *transposed]
    accumulators, set_d = f.filled(d, "f32", "d")
    registers, set_a = f.filled(a, "b32", "a") if from_registers else ("nullptr", "")
    fields = [
        registers,
        "0" if from_registers else f.value(a, "u64"),
        f.value(b, "u64"),
        f.value(scale_d, "pred"),
        *("true" if scale == "-1" else "false" for scale in (scale_a, scale_b)),
        *("true" if t == "1" else "false" for t in transposed),
        f"emu::Type16::{kind}",
    ]
    call = f"emu::wgmma({accumulators}, {n}, {{{', '.join(fields)}}});"
    return f"{set_d} {set_a} {call} {f.assign_elements(d, accumulators, 'f32')}"


@instruction("setmaxnreg")
def setmaxnreg(i: Instruction, f: Operands) -> str:
    for modifier in ("sync", "aligned", "u32"):
        i.need(modifier)
    i.need("inc", "dec")
    return f"emu::setmaxnreg({int(i.operands[0], 0)});"


@instruction("griddepcontrol")
def griddepcontrol(i: Instruction, f: Operands) -> str:
    """Launches run one after the other."""
    i.need("launch_dependents", "wait")
    return ";"
