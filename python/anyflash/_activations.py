"""The activations of bias_activation and fused_mlp: names, and the numbers that operators take."""

from __future__ import annotations

from . import _core

#: In the order of their numbers (kernels/params.h).
ACTIVATIONS = ("gelu_tanh", "gelu_erf", "relu", "squared_relu", "silu_gate")


def activation_number(name: str) -> int:
    """The number of an activation's name, as the operators take it.

    Raises:
        ValueError: an unknown name.
    """
    if _core.library is not None:
        return _core.activation_number(name)
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: unknown name '{name}'")
    return ACTIVATIONS.index(name)


# torch.compile evaluates it while it traces and keeps the result.
activation_number._dynamo_marked_constant = True  # type: ignore[attr-defined]


def inputs_per_output(activation: int) -> int:
    """Columns of x per column of act(x)."""
    return 2 if ACTIVATIONS[activation] == "silu_gate" else 1
