"""Structs of the core (core/*.h, kernels/*.h) field by field, and how a tensor is written into
them."""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import Any

import torch
from torch import Tensor

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
#: In the order of kernels/launch.h's Device.
DEVICES = ("cpu", "cuda", "hip", "mps", "xpu", "other")
_CPU, _CUDA, _HIP, _OTHER = (DEVICES.index(name) for name in ("cpu", "cuda", "hip", "other"))
_NO_MEMORY = -(2**63)


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
        ("return_lse", ctypes.c_bool),
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


class BiasActivationCall(ctypes.Structure):
    """core/mlp.h."""

    _fields_ = [*_views("x", "bias", "dy"), ("activation", ctypes.c_int64)]


class BiasActivationResults(ctypes.Structure):
    """core/mlp.h."""

    _fields_ = [*_views("y", "dx", "dbias"), ("workspace", ctypes.c_void_p)]


class MlpCall(ctypes.Structure):
    """core/mlp.h."""

    _fields_ = [
        *_views("x", "weight1", "bias1", "weight2", "bias2", "dout", "hidden"),
        ("activation", ctypes.c_int64),
    ]


class RotaryCall(ctypes.Structure):
    """core/rotary.h."""

    _fields_ = [
        *_views("x", "cos", "sin", "seqlen_offsets", "cu_seqlens"),
        ("seqlen_offset", ctypes.c_int64),
        ("max_seqlen", ctypes.c_int64),
        ("interleaved", ctypes.c_bool),
        ("conjugate", ctypes.c_bool),
        ("in_place", ctypes.c_bool),
    ]


class NormCall(ctypes.Structure):
    """core/norm.h."""

    _fields_ = [
        *_views("x", "residual", "x1", "weight", "bias", "weight1", "bias1", "rowscale"),
        *_views("dropout_mask", "dropout_mask1"),
        ("dropout_p", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("is_rms_norm", ctypes.c_bool),
        ("zero_centered_weight", ctypes.c_bool),
        ("out_dtype", ctypes.c_int64),
        ("residual_dtype", ctypes.c_int64),
    ]


class NormGradient(ctypes.Structure):
    """core/norm.h."""

    _fields_ = [
        *_views("dy", "dy1", "dresidual_out", "z", "mean", "rstd"),
        ("has_residual", ctypes.c_bool),
        ("has_x1", ctypes.c_bool),
        ("x_dtype", ctypes.c_int64),
    ]


class NormResults(ctypes.Structure):
    """core/norm.h."""

    _fields_ = [
        *_views("y", "y1", "residual_out", "mean", "rstd", "dx", "dx1", "dresidual"),
        *_views("dweight", "dbias", "dweight1", "dbias1", "drowscale"),
        ("workspace", ctypes.c_void_p),
    ]


class CrossEntropyCall(ctypes.Structure):
    """core/cross_entropy.h."""

    _fields_ = [
        *_views("logits", "labels", "lse", "dlosses"),
        ("smoothing", ctypes.c_double),
        ("logit_scale", ctypes.c_double),
        ("lse_square_scale", ctypes.c_double),
        ("ignore_index", ctypes.c_int64),
        ("class_start", ctypes.c_int64),
        ("total_classes", ctypes.c_int64),
        ("in_place", ctypes.c_bool),
    ]


class CrossEntropyResults(ctypes.Structure):
    """core/cross_entropy.h."""

    _fields_ = [*_views("losses", "z_losses", "lse", "dlogits"), ("workspace", ctypes.c_void_p)]


class OneTensor(ctypes.Structure):
    """A TensorView by itself."""

    _fields_ = _views("x")


class Caller(ctypes.Structure):
    """core/describe.h."""

    _fields_ = [("backend", ctypes.c_int64), ("torch_version", ctypes.c_int32)]


class Cubin(ctypes.Structure):
    """kernels/cubin.h."""

    _fields_ = [
        ("sm", ctypes.c_int32),
        ("min_driver", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("changes", ctypes.c_void_p),
        ("num_changes", ctypes.c_int64),
        ("checked_on", ctypes.POINTER(ctypes.c_int32)),
    ]


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
        ("cubins", ctypes.POINTER(Cubin)),
        ("run", ctypes.c_void_p),
    ]


#: Route of core/dispatch.h.
ROUTES = (
    "none",
    "kernel",
    "aten_cudnn",
    "aten_flash",
    "aten_efficient",
    "aten_cpu",
    "aten_sdpa",
    "math",
)


class Choice(ctypes.Structure):
    """core/dispatch.h."""

    _fields_ = [("route_number", ctypes.c_int32), ("instance", ctypes.POINTER(Instance))]

    @property
    def route(self) -> str:
        """A name of routes.def, "kernel" or "none"."""
        return ROUTES[self.route_number]


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
    BiasActivationCall,
    BiasActivationResults,
    MlpCall,
    RotaryCall,
    NormCall,
    NormGradient,
    NormResults,
    CrossEntropyCall,
    CrossEntropyResults,
    Caller,
    Choice,
    DecisionView,
    Cubin,
    Instance,
    Piece,
    CpuThreads,
)

_PACKED = struct.Struct(f"PPq4i{2 * _MAX_RANK}q")
_PADDING = tuple((0,) * (_MAX_RANK - rank) for rank in range(_MAX_RANK + 1))
_ABSENT = bytes(TensorView(rank=-1))


@functools.cache
def _template(record: type[ctypes.Structure]) -> bytes:
    """The record without any tensor."""
    empty = record()
    for name, kind, *_ in record._fields_:
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
    if not (x.is_cpu or is_nvidia(x)):
        put_shape(record, name, x)
        return
    data = host = x.data_ptr()
    room = x.untyped_storage().nbytes() - x.storage_offset() * x.element_size()
    device, index = _CPU, -1
    if not x.is_cpu:
        device, index, host = _CUDA, x.get_device(), 0
    _pack(record, name, x, data, host, room, device, index)  # type: ignore[arg-type]  # no SymInt


def put_shape(record: ctypes.Structure, name: str, x: Tensor) -> None:
    """The same without a look at the tensor's memory, which a meta or fake one does not have."""
    device, index = device_numbers(x.device)
    _pack(record, name, x, 0, 0, _NO_MEMORY, device, index)


def put_kind(record: ctypes.Structure, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """What the decision needs to know of a tensor."""
    view = getattr(record, name)
    view.rank, view.dtype = 0, _DTYPES.get(dtype, 0)
    view.device, view.device_index = device_numbers(device)


def device_numbers(device: torch.device) -> tuple[int, int]:
    """Its kind, as an index of DEVICES, and which one of them; -1 for the CPU."""
    kind = DEVICES.index(device.type) if device.type in DEVICES else _OTHER
    if kind == _CUDA and torch.version.hip is not None:
        kind = _HIP
    return kind, -1 if device.index is None or kind == _CPU else device.index


def _pack(
    record: ctypes.Structure,
    name: str,
    x: Tensor,
    data: int,
    host: int,
    room: int,
    device: int,
    index: int,
) -> None:
    rank, sizes, strides = x.dim(), x.shape, x.stride()
    if rank > _MAX_RANK:
        sizes, strides = sizes[:_MAX_RANK], strides[:_MAX_RANK]
    padding = _PADDING[min(rank, _MAX_RANK)]
    _PACKED.pack_into(
        record, getattr(type(record), name).offset, data, host, room, rank,
        _DTYPES.get(x.dtype, 0), device, index, *sizes, *padding, *strides, *padding,
    )  # fmt: skip


def is_nvidia(x: Tensor) -> bool:
    """Whether a tensor lies on an NVIDIA GPU; AMD's call themselves cuda too."""
    return x.is_cuda and torch.version.hip is None
