"""Errors of the Python operators, in the words of the compiled ones.

Every function raises RuntimeError with a message that names the argument, what came and what was
expected.
"""

from __future__ import annotations

from torch import Tensor

from .arguments import DTYPE_NAMES


def check(condition: bool, *parts: object) -> None:
    """Raises RuntimeError with the parts joined, unless the condition holds."""
    if not condition:
        raise RuntimeError("".join(map(str, parts)))


def shape_text(tensor: Tensor) -> str:
    """``(2, 77, 8, 64)``."""
    return str(tuple(tensor.shape))


def dtype_text(tensor: Tensor) -> str:
    """``fp16``, ``int32``, ..."""
    return DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).replace("torch.", ""))


def check_same_device(reference: Tensor, reference_name: str, tensor: Tensor, name: str) -> None:
    """Both tensors lie on one device."""
    kind = "CUDA" if reference.device.type == "cuda" else "cpu"
    check(
        tensor.device == reference.device,
        f"{name} must be on {kind}: expected {reference.device} like {reference_name}, ",
        f"got {tensor.device}",
    )
