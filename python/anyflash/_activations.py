"""The names of activations."""

from __future__ import annotations

from . import _core


def activation_number(name: str) -> int:
    """The number of an activation's name, as the operators take it.

    Raises:
        ValueError: an unknown name.
    """
    if _core.library is None:
        from ._python_ops import without_core

        return without_core.activation_number(name)
    return _core.activation_number(name)


# torch.compile evaluates it while it traces and keeps the result.
activation_number._dynamo_marked_constant = True  # type: ignore[attr-defined]
