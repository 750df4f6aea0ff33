"""Control flow, barriers, and what the lanes of a warp do together (PTX ISA 9.7.12 to 9.7.14)."""

from __future__ import annotations

from .memory import take_ordering
from .operands import Operands, elements
from .parse import Instruction, TranslationError
from .table import instruction

# ---- control flow ----


@instruction("bra")
def bra(i: Instruction, f: Operands) -> str:
    i.take("uni")
    return f"goto {f.label(i.operands[0])};"


@instruction("brx")
def brx(i: Instruction, f: Operands) -> str:
    i.need("idx")
    i.take("uni")
    index, targets = i.operands
    cases = [f"case {n}: goto {t};" for n, t in enumerate(f.branch_targets(targets))]
    return f"switch ({f.value(index, 'u32')}) {{ {' '.join(cases)} }}"


@instruction("ret", "exit")
def ret(i: Instruction, f: Operands) -> str:
    i.take("uni")
    if i.opcode == "exit" and not f.function.entry:
        raise TranslationError("exit in a function")
    return "return;"


@instruction("call")
def call(i: Instruction, f: Operands) -> str:
    """`call (result), name, (arguments)`: all of them .param arrays of the caller."""
    i.take("uni")
    parts = [x[1:-1] if x.startswith("(") else x for x in i.operands]
    if len(parts) == 2 and not i.operands[0].startswith("("):
        parts = ["", *parts]
    if len(parts) == 1:
        parts = ["", parts[0], ""]
    results, name, arguments = parts
    arrays = [f.array(x.strip()) for x in (results + "," + arguments).split(",") if x.strip()]
    return f"{f.callee(name)}({', '.join(arrays)});"


@instruction("nanosleep")
def nanosleep(i: Instruction, f: Operands) -> str:
    i.take("u32")
    return ";"


# ---- barriers ----


def _barrier_operands(i: Instruction, f: Operands, first: int) -> str:
    operands = i.operands[first:]
    number = f.value(operands[0], "s32")
    threads = f.value(operands[1], "s32") if len(operands) > 1 else "emu::kWholeBlock"
    return f"{number}, {threads}"


@instruction("bar", "barrier")
def barrier(i: Instruction, f: Operands) -> str:
    if i.take("warp"):
        i.need("sync")
        return f"emu::syncwarp({f.value(i.operands[0], 'u32')});"
    i.take("cta")
    i.take("aligned")
    action = i.need("sync", "arrive", "red")
    if action != "red":
        return f"emu::barrier_{action}({_barrier_operands(i, f, 0)});"
    kind = i.type("pred", "u32")
    operation = i.need("and", "or", "popc")
    d, *middle, predicate = i.operands
    i.operands = middle
    name = f"emu::barrier_reduce_{operation}"
    operands = f"{_barrier_operands(i, f, 0)}, {f.value(predicate, 'pred')}"
    return f.assign(d, f"{name}({operands})", kind)


# ---- shuffles and votes ----


@instruction("shfl")
def shfl(i: Instruction, f: Operands) -> str:
    i.type("b32")
    i.need("sync")
    mode = i.need("up", "down", "bfly", "idx")
    i.operand_count(5)
    d, *inputs = i.operands
    values = ", ".join(f.value(x, "u32") for x in inputs)
    result, _, predicate = d.partition("|")
    if not predicate:
        return f.assign(result, f"emu::shfl(emu::Shuffle::{mode}, {values})", "b32")
    shuffled = f.assign(result, f"emu::shfl(emu::Shuffle::{mode}, {values}, &in_range)", "b32")
    return f"{{ bool in_range; {shuffled} {f.assign(predicate, 'in_range', 'pred')} }}"


@instruction("vote")
def vote(i: Instruction, f: Operands) -> str:
    kind = i.type("pred", "b32")
    i.need("sync")
    mode = i.need("all", "any", "uni", "ballot")
    d, predicate, mask = i.operands
    inputs = f"{f.value(mask, 'u32')}, {f.value(predicate, 'pred')}"
    name = "emu::ballot(" if mode == "ballot" else f"emu::vote(emu::Vote::{mode}, "
    return f.assign(d, f"{name}{inputs})", kind)


@instruction("match")
def match(i: Instruction, f: Operands) -> str:
    kind = i.type("b32", "b64")
    mode = i.need("any", "all")
    i.need("sync")
    d, a, mask = i.operands
    result, _, predicate = d.partition("|")
    call = f"emu::match_{mode}({f.value(mask, 'u32')}, {f.value(a, kind)})"
    assigned = f.assign(result, "matched", "b32")
    if predicate:
        assigned += " " + f.assign(predicate, "matched != 0", "pred")
    return f"{{ const uint32_t matched = {call}; {assigned} }}"


@instruction("redux")
def redux(i: Instruction, f: Operands) -> str:
    kind = i.type("u32", "s32", "b32")
    i.need("sync")
    operation = i.need("add", "min", "max", "and", "or", "xor")
    d, a, mask = i.operands
    name = operation + ("_" if operation in ("and", "or", "xor") else "")
    suffix = "s32" if kind == "s32" else "u32"
    inputs = f"emu::Reduce::{name}, {f.value(mask, 'u32')}, {f.value(a, suffix)}"
    return f.assign(d, f"emu::redux_{suffix}({inputs})", suffix)


@instruction("activemask")
def activemask(i: Instruction, f: Operands) -> str:
    i.type("b32")
    return f.assign(i.operands[0], "emu::activemask()", "b32")


@instruction("elect")
def elect(i: Instruction, f: Operands) -> str:
    i.need("sync")
    d, mask = i.operands
    leader, predicate = d.split("|")
    inputs = f"{f.value(mask, 'u32')}, &leader"
    return (
        f"{{ uint32_t leader; {f.assign(predicate, f'emu::elect({inputs})', 'pred')} "
        f"{f.assign(leader, 'leader', 'b32')} }}"
    )


# ---- matrices ----


@instruction("ldmatrix")
def ldmatrix(i: Instruction, f: Operands) -> str:
    i.type("b16")
    count, transposed = _matrices(i)
    r, address = i.operands
    if len(elements(r)) != count:
        raise TranslationError(f"{len(elements(r))} registers")
    v = f.array_of("b32", count)
    call = f"emu::ldmatrix({v}, {count}, {transposed}, {f.address(address, 'shared')});"
    return f"{call} {f.assign_elements(r, v, 'b32')}"


@instruction("stmatrix")
def stmatrix(i: Instruction, f: Operands) -> str:
    i.type("b16")
    count, transposed = _matrices(i)
    address, r = i.operands
    if len(elements(r)) != count:
        raise TranslationError(f"{len(elements(r))} registers")
    v, fill = f.filled(r, "b32")
    return f"{fill} emu::stmatrix({v}, {count}, {transposed}, {f.address(address, 'shared')});"


def _matrices(i: Instruction) -> tuple[int, str]:
    i.need("sync")
    i.need("aligned")
    i.need("m8n8")
    i.need("shared", "shared::cta")
    return int(i.need("x1", "x2", "x4")[1:]), "true" if i.take("trans") else "false"


@instruction("movmatrix")
def movmatrix(i: Instruction, f: Operands) -> str:
    i.type("b16")
    for modifier in ("sync", "aligned", "m8n8", "trans"):
        i.need(modifier)
    d, a = i.operands
    return f.assign(d, f"emu::movmatrix({f.value(a, 'b32')})", "b32")


@instruction("mma")
def mma(i: Instruction, f: Operands) -> str:
    i.need("sync")
    i.need("aligned")
    shape = i.need("m16n8k16", "m16n8k8")
    types = i.modifiers[2:]
    if i.modifiers != ["row", "col", "f32", types[1], types[1], "f32"]:
        raise TranslationError("layout or types of mma")
    kind = types[1]
    if kind not in ("f16", "bf16"):
        raise TranslationError(f"mma of .{kind}")
    i.modifiers.clear()
    d, a, b, c = i.operands
    counts = (4, 4, 2, 4) if shape == "m16n8k16" else (4, 2, 1, 4)
    if tuple(len(elements(x)) for x in i.operands) != counts:
        raise TranslationError("number of registers of mma")
    accumulators, set_c = f.filled(c, "f32", "d")
    left, set_a = f.filled(a, "b32", "a")
    right, set_b = f.filled(b, "b32", "b")
    call = f"emu::mma_{shape}({accumulators}, {left}, {right}, emu::Type16::{kind});"
    return f"{set_c} {set_a} {set_b} {call} {f.assign_elements(d, accumulators, 'f32')}"


# ---- cp.async (9.7.9.25.3); the bulk ones are in hopper.py ----


def cp_async(i: Instruction, f: Operands) -> str:
    if i.take("commit_group"):
        return "emu::cp_async_commit();"
    if i.take("wait_group"):
        return f"emu::cp_async_wait({int(i.operands[0], 0)});"
    if i.take("wait_all"):
        return "emu::cp_async_wait_all();"
    if i.take("mbarrier"):
        i.need("arrive")
        noinc = "true" if i.take("noinc") else "false"
        i.take("shared", "shared::cta")
        i.type("b64")
        return f"emu::cp_async_mbarrier_arrive({f.address(i.operands[0], 'shared')}, {noinc});"
    level = i.need("ca", "cg")
    i.need("shared", "shared::cta")
    i.need("global")
    take_ordering(i)
    i.operand_count(3, 4)
    destination, source, size, *valid = i.operands
    if size not in (("4", "8", "16") if level == "ca" else ("16",)):
        raise TranslationError(f"cp.async of {size} bytes")
    if valid and f.is_predicate(valid[0]):
        bytes_read = f"{f.value(valid[0], 'pred')} ? 0 : {size}"  # ignore-src
    else:
        bytes_read = f.value(valid[0], "s32") if valid else size
    where = f"{f.address(destination, 'shared')}, {f.address(source, 'global')}"
    return f"emu::cp_async({where}, {size}, {bytes_read});"
