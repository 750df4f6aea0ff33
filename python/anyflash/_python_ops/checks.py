"""Errors of the Python operators, in the words of the compiled ones: they name the argument, what
came and what was expected."""

from __future__ import annotations

from torch import Tensor


def check(condition: bool, *parts: object) -> None:
    """Raises RuntimeError with the parts joined, unless the condition holds."""
    if not condition:
        raise RuntimeError("".join(map(str, parts)))


def shape_text(tensor: Tensor) -> str:
    """``(2, 77, 8, 64)``."""
    return str(tuple(tensor.shape))
