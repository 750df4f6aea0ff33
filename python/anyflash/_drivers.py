"""NVIDIA's drivers: branches (R550) and the CUDA that each knows (12040, as cuDriverGetVersion
says it)."""

from __future__ import annotations

import functools
import re
from typing import Any

from . import _defs


@functools.cache
def _branches() -> dict[int, int]:
    """Branch to CUDA, oldest first."""
    fields = (entry.fields for entry in _defs.entries("drivers"))
    return {int(branch): int(cuda) for branch, cuda in fields}


def version_of(said: int | str) -> int:
    """The CUDA that a driver knows.

    Args:
        said: a driver ("550", "R550", "550.54.14", 550) or such a CUDA version (12040).

    Raises:
        ValueError: it is no number, or a driver older than the list.
    """
    found = re.fullmatch(r"[Rr]?(\d+)(?:\.\d+)*", str(said))
    number = int(found[1]) if found else 0
    if number >= 10000:
        return number
    known = [cuda for branch, cuda in _branches().items() if branch <= number]
    if not known:
        oldest = min(_branches())
        raise ValueError(
            f"driver: expected a version such as 550 or 550.54 ({oldest} or newer), got {said}"
        )
    return known[-1]


def text_of(cuda: int) -> str:
    """How a driver is named to people: "R550 (CUDA 12.4)"."""
    branch = next((b for b, version in _branches().items() if version == cuda), None)
    name = "of a branch that is not known here" if branch is None else f"R{branch}"
    return f"{name} (CUDA {cuda // 1000}.{cuda % 1000 // 10})"


def major(cuda: str) -> int:
    """13 of "13.0"."""
    return int(cuda.partition(".")[0])


def too_old(driver: dict[str, Any] | None, instances: list[dict[str, Any]]) -> str | None:
    """A sentence if the driver does not run the CUDA kernels of this build."""
    needed = min((i["min_driver"] for i in instances if i["device"] == "cuda"), default=0)
    if driver is None or not 0 < driver["version"] < needed:
        return None
    return (
        f"anyflash's CUDA kernels need NVIDIA driver {text_of(needed)} or newer, this is "
        f"{text_of(driver['version'])}. PyTorch's own kernels run instead."
    )
