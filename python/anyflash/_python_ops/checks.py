"""The checks that several operators share, with the texts of csrc/validate.cpp.

Every function raises RuntimeError with a message that names the argument, what came and what was
expected; where the original library has a text for the case, the message begins with it.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import backends
from .problem import DTYPE_NAMES

MAX_HEAD_DIM = 512


def check(condition: bool, *parts: object) -> None:
    """Raises RuntimeError with the parts joined, unless the condition holds."""
    if not condition:
        text = (f"{part:g}" if isinstance(part, float) else str(part) for part in parts)
        raise RuntimeError("".join(text))


def shape_text(tensor: Tensor) -> str:
    """``(2, 77, 8, 64)``."""
    return str(tuple(tensor.shape))


def dtype_text(tensor: Tensor) -> str:
    """``fp16``, ``int32``, ..."""
    return DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).replace("torch.", ""))


def device_text(tensor: Tensor) -> str:
    """``cpu``, ``cuda:0``."""
    return str(tensor.device)


@functools.cache
def _check_everything() -> bool:
    return backends.is_set("ANYFLASH_CHECK")


def values_are_checked(q: Tensor) -> bool:
    """True where the values of index tensors on q's device are to be read."""
    return q.device.type == "cpu" or _check_everything()


def check_same_device(reference: Tensor, reference_name: str, tensor: Tensor, name: str) -> None:
    """Both tensors lie on one device."""
    if tensor.device != reference.device:
        kind = "CUDA" if reference.device.type == "cuda" else "cpu"
        check(
            False,
            f"{name} must be on {kind}: expected {device_text(reference)} like {reference_name}, ",
            f"got {device_text(tensor)}",
        )


def check_last_dim_contiguous(tensor: Tensor, name: str) -> None:
    """The last dimension has stride 1."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        check(
            False,
            f"Input tensor must have contiguous last dimension, got {name} with stride ",
            tensor.stride(-1),
        )


def check_index_vector(tensor: Tensor, name: str, q: Tensor, size: int, size_text: str) -> None:
    """One int32 per entry: cu_seqlens, seqused, leftpad."""
    check(tensor.dtype == torch.int32, name, " must have dtype int32, got ", dtype_text(tensor))
    check_same_device(q, "q", tensor, name)
    check(
        tensor.is_contiguous(),
        f"{name} must be contiguous, got shape {shape_text(tensor)} with stride ",
        tensor.stride(-1) if tensor.dim() > 0 else 0,
    )
    check(
        tensor.shape == (size,),
        f"{name} must have shape {size_text}: expected ({size},), got {shape_text(tensor)}",
    )


def check_block_table(table: Tensor, q: Tensor, batch: int) -> None:
    """int32, one row per sequence."""
    check(
        table.dtype == torch.int32,
        f"block_table must have dtype torch.int32, got {dtype_text(table)}",
    )
    check_same_device(q, "q", table, "block_table")
    check(
        table.dim() == 2 and table.shape[0] == batch,
        "block_table must have shape (batch_size, max_num_blocks_per_seq): expected ",
        f"({batch}, max_blocks), got {shape_text(table)}",
    )
    check(
        table.stride(1) == 1 or table.shape[1] <= 1,
        "block_table must have contiguous last dimension, got stride ",
        table.stride(1),
    )


def check_block_table_row(
    row: list[int], sequence: int, used: int, page_size: int, num_blocks: int
) -> None:
    """Every page that the first ``used`` rows of a sequence lie on is a page of the cache."""
    for index, page in enumerate(row[: -(-max(used, 0) // max(page_size, 1))]):
        check(
            0 <= page < num_blocks,
            f"block_table: expected pages 0 to {num_blocks - 1}, got {page} as page {index} ",
            f"of sequence {sequence}",
        )


def check_alibi_slopes(slopes: Tensor, q: Tensor, batch: int, heads: int) -> None:
    """fp32, (heads,) or (batch, heads)."""
    check(
        slopes.dtype == torch.float32,
        f"ALiBi slopes must have dtype fp32, got alibi_slopes of {dtype_text(slopes)}",
    )
    check_same_device(q, "q", slopes, "alibi_slopes")
    check(
        slopes.shape == (heads,) or slopes.shape == (batch, heads),
        f"alibi_slopes: expected (heads,) or (batch, heads) = ({batch}, {heads}), got ",
        shape_text(slopes),
    )
    check(
        slopes.stride(-1) == 1 or heads <= 1,
        "ALiBi slopes tensor must have contiguous last dimension, got alibi_slopes with stride ",
        slopes.stride(-1),
    )


def check_sinks(sinks: Tensor, q: Tensor, heads: int) -> None:
    """Floating, (heads,)."""
    check(sinks.dtype in DTYPE_NAMES, f"sinks: expected a floating dtype, got {dtype_text(sinks)}")
    check_same_device(q, "q", sinks, "sinks")
    check(
        sinks.shape == (heads,),
        f"sinks: expected (heads,) = ({heads},), got {shape_text(sinks)}",
    )


def check_head_dim(name: str, head_dim: int, direction: str) -> None:
    """1 to 512."""
    check(
        head_dim <= MAX_HEAD_DIM,
        f"FlashAttention {direction} only supports head dimension at most 256 ",
        f"(anyflash: {MAX_HEAD_DIM}), got {name} with head_dim {head_dim}",
    )
    check(head_dim > 0, f"{name}: expected a head_dim of 1 to {MAX_HEAD_DIM}, got {head_dim}")


def check_window_and_scale(softmax_scale: float, softcap: float) -> None:
    """Finite numbers."""
    check(
        math.isfinite(softmax_scale),
        "softmax_scale: expected a finite number, got ",
        softmax_scale,
    )
    check(
        math.isfinite(softcap) and softcap >= 0.0,
        "softcap: expected a finite number of 0 or more, got ",
        softcap,
    )
