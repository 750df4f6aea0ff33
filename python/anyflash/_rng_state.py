"""Where one call's dropout begins: seed and offset of the Philox generator, (2,) int64."""

from __future__ import annotations

import torch
from torch import Tensor

from ._autograd import in_functorch, is_compiling
from ._core import torch_version

_MERGES_EQUAL_CALLS = torch_version() < 215


def draw_rng_state(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Seed and offset for one call, from a generator, else torch's default one of the device."""
    return torch.randint(0, 2**62, (2,), generator=generator, dtype=torch.int64, device=device)


def must_be_given() -> bool:
    """Whether the operator must not draw itself: inside a transform of torch.func, which has rules
    of its own for random numbers, and in graphs of a compiler that merges equal calls of operators
    with the tag nondeterministic_seeded."""
    return in_functorch() or (is_compiling() and _MERGES_EQUAL_CALLS)
