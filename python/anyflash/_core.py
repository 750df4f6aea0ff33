"""The core (core/interface.h) by ctypes: what the compiled operators and Python's have in common.

The records that go across are those of _records.py.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._records import (
    DEVICES,
    MIRRORED,
    BiasActivationCall,
    Caller,
    Choice,
    Cubin,
    DecisionView,
    Instance,
    MlpCall,
    OneTensor,
    Piece,
    new,
    put,
    put_kind,
)

#: libanyflash_kernels.so; None where it is not there or cannot be used.
library: ctypes.CDLL | None = None

FAMILIES = ("attention", "bias_activation", "kvcache_append", "rotary", "norm", "cross_entropy")
DIRECTIONS = ("forward", "backward")
DTYPE_NAMES = {1: "fp16", 2: "bf16", 4: "fp32", 8: "fp64"}


def put_with_values(
    record: ctypes.Structure, name: str, x: Tensor | None, copies: list[Tensor]
) -> None:
    """``_records.put`` for a tensor whose values may be checked: with ANYFLASH_CHECK=1 int32 ones
    of a GPU are copied to the host; ``copies`` keeps them alive."""
    put(record, name, x)
    if x is not None and x.is_cuda and x.dtype == torch.int32 and checks_values():
        copies.append(x.cpu().contiguous())
        getattr(record, name).host = copies[-1].data_ptr()


def as_matrix(x: Tensor) -> Tensor:
    """x itself where it is what core/run.h takes for a matrix, else a contiguous copy."""
    return x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous()


def contiguous_rows(x: Tensor) -> Tensor:
    """x itself where the elements of a row lie side by side, else a contiguous copy."""
    return x if x.dim() == 0 or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


@functools.cache
def torch_version() -> int:
    """The running torch as a number: 213 for 2.13."""
    match = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return int(match.group(1)) * 100 + int(match.group(2)) if match else 0


def caller(backend: int) -> Caller:
    """Who asks for a decision: this torch, with an order of back ends as a number."""
    return Caller(backend, torch_version())


def raise_for(status: int) -> None:
    """Raises what a Status other than ok says.

    Raises:
        RuntimeError, ValueError, MemoryError: with the core's text.
    """
    if status == 0:
        return
    text = loaded().anyflash_text().decode()
    raise {2: ValueError, 3: MemoryError}.get(status, RuntimeError)(text)


def loaded() -> ctypes.CDLL:
    """The library, for callers that run only where it is there."""
    assert library is not None, "the kernel library is not loaded"
    return library


_STATUS = ctypes.c_int32
_POINTER = ctypes.c_void_p
_INT64 = ctypes.c_int64
#: Result and arguments of every function that Python calls. Records go by reference.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "anyflash_text": (ctypes.c_char_p,),
    "anyflash_prepare_attention": (_STATUS, _POINTER, _POINTER, ctypes.c_bool, *2 * [_POINTER]),
    "anyflash_prepare_kvcache": (_STATUS, _POINTER, ctypes.c_bool, *4 * [_POINTER]),
    "anyflash_run_attention": (_STATUS, *4 * [_POINTER]),
    "anyflash_run_attention_backward": (_STATUS, *5 * [_POINTER]),
    "anyflash_run_kvcache_append": (_STATUS, *5 * [_POINTER]),
    "anyflash_attention_forward_workspace": (_INT64, *2 * [_POINTER]),
    "anyflash_attention_backward_workspace": (_INT64, *4 * [_POINTER]),
    "anyflash_prepare_bias_activation": (_STATUS, *3 * [_POINTER]),
    "anyflash_run_bias_activation": (_STATUS, *4 * [_POINTER]),
    "anyflash_bias_activation_workspace": (_INT64, _INT64, _INT64, ctypes.c_int32),
    "anyflash_check_fused_mlp": (_STATUS, _POINTER),
    "anyflash_activation": (_STATUS, ctypes.c_char_p, _POINTER),
    "anyflash_prepare_rotary": (_STATUS, *2 * [_POINTER]),
    "anyflash_run_rotary": (_STATUS, *4 * [_POINTER]),
    "anyflash_prepare_norm": (_STATUS, *3 * [_POINTER]),
    "anyflash_norm_workspace": (_INT64, *2 * [_POINTER]),
    "anyflash_run_norm": (_STATUS, *5 * [_POINTER]),
    "anyflash_prepare_cross_entropy": (_STATUS, *2 * [_POINTER]),
    "anyflash_cross_entropy_workspace": (_INT64, _POINTER),
    "anyflash_run_cross_entropy": (_STATUS, *4 * [_POINTER]),
    "anyflash_choose": (_STATUS, _POINTER, ctypes.c_int32, ctypes.c_int32, *2 * [_POINTER]),
    "anyflash_plan_pieces": (
        _INT64, *4 * [_INT64], ctypes.c_int32, _POINTER, _INT64, *2 * [_POINTER],
    ),
    "anyflash_decide": (_STATUS, ctypes.c_char_p, _POINTER),
    "anyflash_environment_isa": (_STATUS, _POINTER, _POINTER),
    "anyflash_checks_values": (ctypes.c_bool,),
    "anyflash_route_name": (ctypes.c_char_p, ctypes.c_int32),
    "anyflash_set_notice_sink": (None, _POINTER),
    "anyflash_parallel_for_by_openmp": (_POINTER, _POINTER),
    "anyflash_layout": (ctypes.c_char_p,),
    "anyflash_build_compiler": (ctypes.c_char_p,),
    "anyflash_build_archs": (ctypes.c_char_p,),
    "anyflash_build_nvrtc": (ctypes.c_char_p,),
    "anyflash_instances": (ctypes.POINTER(Instance), _POINTER),
}  # fmt: skip


def open_library(path: pathlib.Path) -> str | None:
    """Loads the kernel library once; returns what is in the way."""
    global library
    try:
        found = ctypes.CDLL(str(path))
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded: {error}"
    sizes = dict(line.split() for line in found.anyflash_layout().decode().splitlines())
    for record in MIRRORED:
        here = ctypes.sizeof(record)
        if sizes.get(record.__name__) != str(here):
            built = sizes.get(record.__name__, "no")
            return (
                f"{path.name} belongs to another version of anyflash's Python files: "
                f"{record.__name__} has {built} bytes there, {here} here"
            )
    library = found
    return None


@functools.cache
def checks_values() -> bool:
    """ANYFLASH_CHECK=1."""
    return bool(loaded().anyflash_checks_values())


def cpu_isa() -> tuple[str, bool]:
    """The instruction set that CPU kernels may use: this machine's, or what ANYFLASH_CPU_ISA says;
    and whether the machine has more.

    Raises:
        ValueError: ANYFLASH_CPU_ISA names an unknown one, or one that this CPU does not have.
    """
    name, lowered = ctypes.c_char_p(), ctypes.c_bool()
    raise_for(loaded().anyflash_environment_isa(ctypes.byref(name), ctypes.byref(lowered)))
    assert name.value is not None
    return name.value.decode(), lowered.value


def cubins(instance: Instance) -> Iterator[Cubin]:
    """The machine code of a kernel for GPUs."""
    for place in itertools.count() if instance.cubins else ():
        if not instance.cubins[place].data:
            return
        yield instance.cubins[place]


def machine_code(cubin: Cubin) -> bytes:
    """The ELF file that the driver is given."""
    code = bytearray(ctypes.string_at(cubin.data, cubin.bytes))
    changes = ctypes.cast(cubin.changes, ctypes.POINTER(ctypes.c_uint32))
    for change in changes[: cubin.num_changes]:
        code[change >> 8] = change & 0xFF
    return bytes(code)


def table() -> list[Instance]:
    """The records of the compiled kernels."""
    count = ctypes.c_int32()
    return loaded().anyflash_instances(ctypes.byref(count))[: count.value]


def instances() -> list[dict[str, Any]]:
    """The compiled kernels, a dict for each line of instances.def that is in this build."""
    from . import _defs

    features = tuple(_defs.feature_phrases())
    rows = []
    for instance in table():
        row = {
            name: value.decode() if isinstance(value, bytes) else value
            for name, value in (
                (field[0], getattr(instance, field[0])) for field in instance._fields_
            )
            if name not in ("cubins", "run")
        }
        row["family"] = FAMILIES[instance.family]
        row["device"] = DEVICES[instance.device]
        row["direction"] = DIRECTIONS[instance.direction]
        row["dtype"] = DTYPE_NAMES[instance.dtype]
        row["code"] = {cubin.sm: cubin.min_driver for cubin in cubins(instance)}
        row["features"] = [
            name for bit, name in enumerate(features) if instance.features >> bit & 1
        ]
        rows.append(row)
    return rows


def build_info() -> dict[str, Any]:
    """What the kernel library was built with."""
    built = loaded()
    return {
        "nvrtc": built.anyflash_build_nvrtc().decode(),
        "archs": built.anyflash_build_archs().decode(),
        "compiler": built.anyflash_build_compiler().decode(),
    }


def _field(value: object) -> str:
    if isinstance(value, (list, tuple, set, frozenset)):
        return ",".join(map(str, value))
    return str(int(value)) if isinstance(value, bool) else str(value)


def decide(problem: dict[str, Any]) -> dict[str, Any]:
    """The route for a problem: {'route', 'instance', 'measured', 'reasons': [(route, text), ...]},
    and 'refusal' if there is none.

    Raises:
        ValueError: a field or value that does not exist.
    """
    lines = "".join(f"{name}={_field(value)}\n" for name, value in problem.items())
    view = DecisionView()
    raise_for(loaded().anyflash_decide(lines.encode(), ctypes.byref(view)))
    told = [line.split("\t", 1) for line in loaded().anyflash_text().decode().splitlines()]
    chosen = view.choice.instance.contents.name.decode() if view.choice.instance else None
    decision: dict[str, Any] = {
        "route": view.choice.route,
        "instance": chosen,
        "measured": {"worst": view.worst, "median": view.median} if view.is_measured else None,
        "reasons": [(route, text) for route, text in told if route != "refusal"],
    }
    for route, text in told:
        if route == "refusal":
            decision["refusal"] = text
    return decision


def choose(family: str, device: torch.device, dtype: torch.dtype, backend: int) -> Choice:
    """The choice for a family other than attention, with its fallback told.

    Raises:
        RuntimeError: no back end of the order can.
        ValueError: an order of back ends that is none.
    """
    record = new(OneTensor)
    put_kind(record, "x", device, dtype)
    choice, asked = Choice(), caller(backend)
    references = map(ctypes.byref, (asked, choice))
    raise_for(
        loaded().anyflash_choose(ctypes.byref(record), FAMILIES.index(family), 0, *references)
    )
    return choice


def prepare(name: str, *records: ctypes.Structure | None, finds_kernel: bool) -> Any:
    """``anyflash_prepare_<name>`` of these records: checks; where asked for returns the kernel.

    Raises:
        RuntimeError: what cannot be computed, or where there is no kernel.
    """
    kernel = ctypes.POINTER(Instance)()
    function = getattr(loaded(), f"anyflash_prepare_{name}")
    found = ctypes.byref(kernel) if finds_kernel else None
    raise_for(function(*map(reference, records), found))
    return kernel


def reference(record: ctypes.Structure | None) -> Any:
    """A record as an argument; None is a null pointer."""
    return None if record is None else ctypes.byref(record)


def prepare_bias_activation(call: BiasActivationCall, backend: int) -> Choice:
    """Checks, decides and tells.

    Raises:
        RuntimeError: what cannot be computed.
        ValueError: an activation or an order of back ends that is none.
    """
    choice, asked = Choice(), caller(backend)
    references = map(ctypes.byref, (call, asked, choice))
    raise_for(loaded().anyflash_prepare_bias_activation(*references))
    return choice


def bias_activation_workspace(rows: int, columns: int, activation: int) -> int:
    """Bytes of workspace for a backward that returns dbias."""
    return int(loaded().anyflash_bias_activation_workspace(rows, columns, activation))


def check_fused_mlp(call: MlpCall) -> None:
    """Checks the arguments of the fused MLP, or of its backward.

    Raises:
        RuntimeError: what cannot be computed.
        ValueError: an activation that is none.
    """
    raise_for(loaded().anyflash_check_fused_mlp(ctypes.byref(call)))


@functools.cache
def activation_number(name: str) -> int:
    """The number of an activation's name.

    Raises:
        ValueError: an unknown name.
    """
    number = _INT64()
    raise_for(loaded().anyflash_activation(str(name).encode(), ctypes.byref(number)))
    return number.value


def plan_pieces(
    seqlen_q: int, seqlen_k: int, window_left: int, window_right: int, purpose: int
) -> tuple[int, int, list[Piece]]:
    """core/pieces.h: the rows that see a key, and the pieces. purpose: 0 forward, 1 backward,
    2 with explicit masks."""
    room = 16
    while True:
        pieces = (Piece * room)()
        begin, end = _INT64(), _INT64()
        count = loaded().anyflash_plan_pieces(
            seqlen_q, seqlen_k, window_left, window_right, purpose, pieces, room,
            ctypes.byref(begin), ctypes.byref(end),
        )  # fmt: skip
        if count <= room:
            return begin.value, end.value, pieces[:count]
        room = count
