"""The numbers that public functions take: their kind, checked in the caller's words. Symbolic ones
pass as they are, so that an export keeps them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from ._autograd import in_functorch, is_seen, needs_autograd


def _element(name: str, kind: str, value: Tensor) -> Any:
    """The number of a tensor of one element. Waits for its device."""
    whole = not value.is_floating_point() and not value.is_complex()
    if value.numel() != 1 or (kind == "an int" and not whole) or value.is_complex():
        raise TypeError(
            f"{name}: expected {kind} or a tensor of one, got {value.dtype} {tuple(value.shape)}"
        )
    return value.item()


def integer(name: str, value: Any) -> int:
    """An int, from whatever stands for one: a symbolic number, NumPy's, a tensor of one element."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]  # a SymInt stands for an int
    if isinstance(value, Tensor):
        return _element(name, "an int", value)
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {value!r}") from None


def real(name: str, value: Any) -> float:
    """A float, from whatever stands for one."""
    if type(value) is float or isinstance(value, (int, torch.SymFloat, torch.SymInt)):
        return value  # type: ignore[return-value]  # a SymFloat stands for a float
    if isinstance(value, Tensor):
        return _element(name, "a number", value)
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return float(value)


def window(window_size: Any) -> tuple[int, int]:
    """(left, right) from two numbers."""
    if len(window_size) != 2:
        raise RuntimeError(f"window_size: expected (left, right), got {len(window_size)} numbers")
    left, right = window_size
    if type(left) is int and type(right) is int:
        return left, right
    return integer("window_size", left), integer("window_size", right)


def scaled(q: Tensor, softmax_scale: Any) -> tuple[Tensor, float]:
    """The queries and the factor of their scores.

    A scale that asks for a gradient is multiplied into q, from where its gradient comes; and so is
    every tensor in a graph, which cannot read it.
    """
    if not isinstance(softmax_scale, Tensor):
        return q, real("softmax_scale", softmax_scale)
    if not (needs_autograd(softmax_scale) or in_functorch() or is_seen()):
        return q, real("softmax_scale", softmax_scale)
    if softmax_scale.numel() != 1 or not softmax_scale.is_floating_point():
        raise TypeError(
            f"softmax_scale: expected a number or a floating tensor of one, got "
            f"{softmax_scale.dtype} {tuple(softmax_scale.shape)}"
        )
    return q * softmax_scale.reshape(()).to(q.device), 1.0
