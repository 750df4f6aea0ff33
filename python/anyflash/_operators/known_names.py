"""The names under which trainers know attention: ``flash_attn::_flash_attn_forward`` and its like.

Whoever imports the drop-in registers them, if they are free. Another package may take them over
later; then they are not ours any more, and calls go to the operators of this library.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

_libraries: list[torch.library.Library] = []


def take(names: Iterable[str]) -> dict[str, torch.library.Library]:
    """Where each ``flash_attn::name`` is to be defined; empty where somebody has one of them, and
    before torch 2.4."""
    custom_ops = getattr(getattr(torch, "_library", None), "custom_ops", None)
    owners = getattr(custom_ops, "OPDEF_TO_LIB", None)
    qualified = {name: f"flash_attn::{name}" for name in names}
    is_taken = torch._C._jit_get_schemas_for_operator
    if owners is None or any(is_taken(name) for name in qualified.values()):
        return {}
    taken = {name: torch.library.Library("flash_attn", "FRAGMENT") for name in qualified}
    # As the libraries of custom operators: another package's custom_op of the name then replaces
    # ours, where it would otherwise fail at a definition that torch knows nothing of.
    owners.update((qualified[name], library) for name, library in taken.items())
    _libraries.extend(taken.values())
    return taken


def are_ours() -> bool:
    """Whether the names are registered, all by us."""
    return len(_libraries) > 0 and all(library.m is not None for library in _libraries)


# torch.compile evaluates it while it traces and keeps the result.
are_ours._dynamo_marked_constant = True  # type: ignore[attr-defined]
