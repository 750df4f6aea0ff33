"""The core (core/interface.h) by ctypes: what the compiled operators and Python's have in common.

Structs mirror those of core/ field by field; ``open_library`` compares their sizes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import pathlib
import re
import struct
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

#: libanyflash_kernels.so; None where it is not there or cannot be used.
library: ctypes.CDLL | None = None

_MAX_RANK = 8
_DTYPES = {
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float32: 4,
    torch.float64: 8,
    torch.bool: 16,
    torch.int32: 17,
    torch.int64: 18,
    torch.uint8: 19,
    torch.int8: 20,
    torch.int16: 21,
    torch.complex64: 22,
    torch.complex128: 23,
    **{
        getattr(torch, name): code
        for name, code in (("float8_e4m3fn", 24), ("float8_e5m2", 25))
        if hasattr(torch, name)
    },
}
_CPU, _CUDA, _OTHER = range(3)

FAMILIES = ("attention", "bias_activation", "kvcache_append", "rotary", "norm", "cross_entropy")
DIRECTIONS = ("forward", "backward")
DEVICES = ("cpu", "cuda")
DTYPE_NAMES = {1: "fp16", 2: "bf16", 4: "fp32", 8: "fp64"}


class TensorView(ctypes.Structure):
    """core/tensor_view.h. A rank of -1: no tensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("host", ctypes.c_void_p),
        ("storage_bytes", ctypes.c_int64),
        ("rank", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * _MAX_RANK),
        ("strides", ctypes.c_int64 * _MAX_RANK),
    ]


class AttentionOptions(ctypes.Structure):
    """core/attention.h."""

    _fields_ = [
        ("max_seqlen_q", ctypes.c_int64),
        ("max_seqlen_k", ctypes.c_int64),
        ("dropout_p", ctypes.c_double),
        ("softmax_scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("window_left", ctypes.c_int64),
        ("window_right", ctypes.c_int64),
    ]


def _views(*names: str) -> list[tuple[str, Any]]:
    return [(name, TensorView) for name in names]


class AttentionCall(ctypes.Structure):
    """core/attention.h."""

    _fields_ = [
        *_views("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k"),
        *_views("block_table", "alibi_slopes", "bias", "sinks", "rng_state"),
        ("options", AttentionOptions),
    ]


class BackwardCall(ctypes.Structure):
    """core/attention.h."""

    _fields_ = [
        *_views("dout", "out", "lse", "dlse"),
        ("deterministic", ctypes.c_bool),
        ("bias_requires_grad", ctypes.c_bool),
        ("sinks_requires_grad", ctypes.c_bool),
    ]


class AttentionResults(ctypes.Structure):
    """core/attention.h."""

    _fields_ = [
        *_views("out", "lse", "dq", "dk", "dv", "dbias", "dsinks"),
        ("workspace", ctypes.c_void_p),
    ]


class KVCacheCall(ctypes.Structure):
    """core/kvcache.h."""

    _fields_ = [
        *_views("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin"),
        *_views("cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table"),
        *_views("alibi_slopes", "sinks"),
        ("options", AttentionOptions),
        ("rotary_interleaved", ctypes.c_bool),
    ]


class AppendResults(ctypes.Structure):
    """core/kvcache.h."""

    _fields_ = _views("q_rotated", "seqused_k")


class Caller(ctypes.Structure):
    """core/describe.h."""

    _fields_ = [("backend", ctypes.c_int64), ("torch_version", ctypes.c_int32)]


class Instance(ctypes.Structure):
    """kernels/launch.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("family", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("arch", ctypes.c_char_p),
        ("min_sm", ctypes.c_int32),
        ("max_sm", ctypes.c_int32),
        ("direction", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("max_head_dim", ctypes.c_int32),
        ("head_dim_multiple", ctypes.c_int32),
        ("features", ctypes.c_uint32),
        ("checked_on", ctypes.c_char_p),
        ("run", ctypes.c_void_p),
    ]


class Choice(ctypes.Structure):
    """core/dispatch.h."""

    _fields_ = [("route_number", ctypes.c_int32), ("instance", ctypes.POINTER(Instance))]

    @property
    def route(self) -> str:
        """A name of routes.def, "kernel" or "none"."""
        return _route_names()[self.route_number]

    @property
    def on_gpu(self) -> bool:
        """With the route kernel: whether it is a GPU's."""
        return bool(self.instance.contents.device == _CUDA)


class DecisionView(ctypes.Structure):
    """core/interface.h."""

    _fields_ = [
        ("choice", Choice),
        ("is_measured", ctypes.c_bool),
        ("worst", ctypes.c_double),
        ("median", ctypes.c_double),
    ]


class Piece(ctypes.Structure):
    """core/pieces.h."""

    _fields_ = [
        ("row_begin", ctypes.c_int64),
        ("row_end", ctypes.c_int64),
        ("key_begin", ctypes.c_int64),
        ("key_end", ctypes.c_int64),
        ("mask", ctypes.c_int32),
        ("merges", ctypes.c_bool),
    ]


class CpuThreads(ctypes.Structure):
    """kernels/params.h."""

    _fields_ = [("parallel_for", ctypes.c_void_p), ("num_threads", ctypes.c_int32)]


MIRRORED: tuple[type[ctypes.Structure], ...] = (
    TensorView,
    AttentionOptions,
    AttentionCall,
    BackwardCall,
    AttentionResults,
    KVCacheCall,
    AppendResults,
    Caller,
    Choice,
    DecisionView,
    Instance,
    Piece,
)

_PACKED = struct.Struct(f"PPq4i{2 * _MAX_RANK}q")
_PADDING = tuple((0,) * (_MAX_RANK - rank) for rank in range(_MAX_RANK + 1))
_ABSENT = bytes(TensorView(rank=-1))


@functools.cache
def _template(record: type[ctypes.Structure]) -> bytes:
    """The record without any tensor."""
    empty = record()
    for name, kind in record._fields_:
        if kind is TensorView:
            field = getattr(record, name)
            ctypes.memmove(ctypes.addressof(empty) + field.offset, _ABSENT, len(_ABSENT))
    return bytes(empty)


def new(record: type[ctypes.Structure]) -> Any:
    """A record whose tensors are all absent."""
    return record.from_buffer_copy(_template(record))


def put(record: ctypes.Structure, name: str, x: Tensor | None) -> None:
    """Writes a tensor down in the record's view of that name; None leaves it absent."""
    if x is None:
        return
    rank, dtype, device, index = x.dim(), _DTYPES.get(x.dtype, 0), _CPU, -1
    data = host = room = 0
    if x.is_cpu or x.is_cuda:
        data = host = x.data_ptr()
        room = x.untyped_storage().nbytes() - x.storage_offset() * x.element_size()
    if not x.is_cpu:
        device, index, host = (_CUDA if is_nvidia(x) else _OTHER), x.get_device(), 0
    sizes, strides = x.shape, x.stride()
    if rank > _MAX_RANK:
        sizes, strides = sizes[:_MAX_RANK], strides[:_MAX_RANK]
    padding = _PADDING[min(rank, _MAX_RANK)]
    _PACKED.pack_into(
        record, getattr(type(record), name).offset, data, host, room, rank, dtype, device, index,
        *sizes, *padding, *strides, *padding,
    )  # fmt: skip


def put_with_values(
    record: ctypes.Structure, name: str, x: Tensor | None, copies: list[Tensor]
) -> None:
    """The same for an int32 tensor whose values are checked: with ANYFLASH_CHECK=1 a GPU's are
    copied to the host; ``copies`` keeps them alive."""
    put(record, name, x)
    if x is not None and x.is_cuda and x.dtype == torch.int32 and checks_values():
        copies.append(x.cpu().contiguous())
        getattr(record, name).host = copies[-1].data_ptr()


def is_nvidia(x: Tensor) -> bool:
    """Whether a tensor lies on an NVIDIA GPU; AMD's call themselves cuda too."""
    return x.is_cuda and torch.version.hip is None


@functools.cache
def torch_version() -> int:
    """The running torch as a number: 213 for 2.13."""
    match = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return int(match.group(1)) * 100 + int(match.group(2)) if match else 0


def caller(backend: int) -> Caller:
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
    "anyflash_run_forward": (_STATUS, *4 * [_POINTER]),
    "anyflash_run_backward": (_STATUS, *5 * [_POINTER]),
    "anyflash_run_append": (_STATUS, *5 * [_POINTER]),
    "anyflash_forward_workspace": (_INT64, *2 * [_POINTER]),
    "anyflash_choose": (_STATUS, _POINTER, ctypes.c_int32, ctypes.c_int32, *2 * [_POINTER]),
    "anyflash_plan_pieces": (
        _INT64, *4 * [_INT64], ctypes.c_int32, _POINTER, _INT64, *2 * [_POINTER],
    ),
    "anyflash_decide": (_STATUS, ctypes.c_char_p, _POINTER),
    "anyflash_environment_isa": (_STATUS, _POINTER),
    "anyflash_checks_values": (ctypes.c_bool,),
    "anyflash_route_name": (ctypes.c_char_p, ctypes.c_int32),
    "anyflash_set_notice_sink": (None, _POINTER),
    "anyflash_parallel_for_by_openmp": (_POINTER, _POINTER),
    "anyflash_layout": (ctypes.c_char_p,),
    "anyflash_build_compiler": (ctypes.c_char_p,),
    "anyflash_build_archs": (ctypes.c_char_p,),
    "anyflash_build_cuda_version": (ctypes.c_int32,),
    "anyflash_instances": (ctypes.POINTER(Instance), _POINTER),
    "anyflash_dropout_keep": (
        None, _INT64, _INT64, *3 * [ctypes.c_uint32], ctypes.c_double, _POINTER,
    ),
    "anyflash_kv_ranges": (None, *4 * [_INT64], _POINTER),
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
def _route_names() -> tuple[str, ...]:
    name = loaded().anyflash_route_name
    return tuple(name(number).decode() for number in range(7))


@functools.cache
def checks_values() -> bool:
    """ANYFLASH_CHECK=1."""
    return bool(loaded().anyflash_checks_values())


def cpu_isa() -> str:
    """The instruction set that CPU kernels may use: this machine's, or what ANYFLASH_CPU_ISA says.

    Raises:
        ValueError: ANYFLASH_CPU_ISA names an unknown one, or one that this CPU does not have.
    """
    name = ctypes.c_char_p()
    raise_for(loaded().anyflash_environment_isa(ctypes.byref(name)))
    assert name.value is not None
    return name.value.decode()


def instances() -> list[dict[str, Any]]:
    """The compiled kernels, a dict for each line of instances.def that is in this build."""
    from . import _defs

    count = ctypes.c_int32()
    table = loaded().anyflash_instances(ctypes.byref(count))
    features = tuple(_defs.feature_phrases())
    rows = []
    for instance in table[: count.value]:
        row = {
            name: value.decode() if isinstance(value, bytes) else value
            for name, value in ((name, getattr(instance, name)) for name, _ in instance._fields_)
            if name != "run"
        }
        row["family"] = FAMILIES[instance.family]
        row["device"] = DEVICES[instance.device]
        row["direction"] = DIRECTIONS[instance.direction]
        row["dtype"] = DTYPE_NAMES[instance.dtype]
        row["features"] = [
            name for bit, name in enumerate(features) if instance.features >> bit & 1
        ]
        rows.append(row)
    return rows


def build_info() -> dict[str, Any]:
    """What the kernel library was built with."""
    built = loaded()
    return {
        "cuda_version": built.anyflash_build_cuda_version(),
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
    decision.update({"refusal": text for route, text in told if route == "refusal"})
    return decision


def choose(x: Tensor, family: str, direction: str, backend: int) -> Choice:
    """The choice for a family other than attention, with its fallback told.

    Raises:
        RuntimeError: no back end of the chain can.
    """
    record = new(_OneTensor)
    put(record, "x", x)
    choice, asked = Choice(), caller(backend)
    number, way = FAMILIES.index(family), DIRECTIONS.index(direction)
    raise_for(
        loaded().anyflash_choose(
            ctypes.byref(record), number, way, ctypes.byref(asked), ctypes.byref(choice)
        )
    )
    return choice


class _OneTensor(ctypes.Structure):
    _fields_ = _views("x")


def plan_pieces(
    seqlen_q: int, seqlen_k: int, window_left: int, window_right: int, purpose: int
) -> tuple[int, int, list[Piece]]:
    """core/pieces.h: the rows that see a key, and the pieces. purpose: 0 forward, 1 backward,
    2 with a bias."""
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


def dropout_keep(
    seed: int, offset: int, bh: int, rows: int, cols: int, dropout_p: float
) -> bytes:
    """One byte per element of (rows, cols), 1 = kept."""
    kept = ctypes.create_string_buffer(max(rows * cols, 1))
    loaded().anyflash_dropout_keep(seed, offset, bh, rows, cols, dropout_p, kept)
    return kept.raw[: rows * cols]


def kv_ranges(
    seqlen_q: int, seqlen_k: int, window_left: int, window_right: int
) -> list[tuple[int, int]]:
    """(kv_begin, kv_end) per query row."""
    ranges = (_INT64 * max(2 * seqlen_q, 1))()
    loaded().anyflash_kv_ranges(seqlen_q, seqlen_k, window_left, window_right, ranges)
    return [(ranges[2 * row], ranges[2 * row + 1]) for row in range(seqlen_q)]


def _openmp_library() -> pathlib.Path | None:
    """The OpenMP runtime that torch has brought into the process."""
    try:
        maps = pathlib.Path("/proc/self/maps").read_text()
    except OSError:
        return None
    for name in ("libgomp", "libiomp5", "libomp"):
        match = re.search(rf"\s(/\S*{name}\S*\.so\S*)$", maps, re.MULTILINE)
        if match:
            return pathlib.Path(match.group(1))
    return None


@functools.cache
def _parallel_for() -> int | None:
    """Torch's threads as the kernels take them; None: there is no way to them."""
    torch_cpu = pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with contextlib.suppress(OSError, AttributeError):  # torch 2.10 has the function
        function = ctypes.CDLL(str(torch_cpu)).torch_parallel_for
        return ctypes.cast(function, ctypes.c_void_p).value
    with contextlib.suppress(OSError, AttributeError):
        path = _openmp_library()
        if path is not None:
            gomp = ctypes.CDLL(str(path)).GOMP_parallel
            return loaded().anyflash_parallel_for_by_openmp(ctypes.cast(gomp, ctypes.c_void_p))
    return None


def has_threads() -> bool:
    """Whether CPU kernels called from Python can use torch's threads."""
    return _parallel_for() is not None


@contextlib.contextmanager
def launch_on(x: Tensor) -> Iterator[Any]:
    """Where a kernel runs on x's device: torch's threads, or its current stream."""
    if x.is_cuda:
        with torch.cuda.device(x.device):
            yield torch.cuda.current_stream().cuda_stream
    else:
        yield ctypes.byref(CpuThreads(_parallel_for(), torch.get_num_threads()))
