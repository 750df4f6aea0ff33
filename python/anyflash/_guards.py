"""Guards of torch's dispatcher as context managers; in torch 2.0 they are objects that guard while
they live."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def _as_context_manager(guard: Any) -> Any:
    if hasattr(guard, "__enter__"):
        return guard

    @contextlib.contextmanager
    def hold() -> Iterator[None]:
        alive = guard()
        try:
            yield
        finally:
            del alive

    return hold


#: What runs inside is not recorded by autograd.
BelowAutograd = _as_context_manager(torch._C._AutoDispatchBelowAutograd)
#: What runs inside keeps its dtypes under autocast.
WithoutAutocast = _as_context_manager(torch._C._DisableAutocast)
