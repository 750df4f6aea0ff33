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


#: Integrated GPUs, which run their own code alone.
INTEGRATED = (72, 87, 101)


def runs_on(code: int, sm: int) -> bool:
    """Whether a GPU runs machine code for an architecture: Cubin::runs_on."""
    return code == sm or (code < sm and code // 10 == sm // 10 and sm not in INTEGRATED)


def why_no_kernels(
    gpu: dict[str, Any], driver: dict[str, Any] | None, instances: list[dict[str, Any]]
) -> tuple[str, str] | None:
    """Why this build's CUDA kernels do not run on a GPU: a sentence and the name of a remedy.

    Args:
        gpu: of _machine.gpus.
        instances: of _core.instances; "code" is the architectures that a kernel has machine code
            for, with the oldest CUDA of a driver that loads it.
    """
    codes = [instance["code"] for instance in instances if instance["device"] == "cuda"]
    if gpu["kind"] != "cuda" or not codes:
        return None
    sm, instead = gpu["sm"], "PyTorch's own kernels run instead."
    needed = [oldest for code in codes for arch, oldest in code.items() if runs_on(arch, sm)]
    if not needed:
        built = ", ".join(f"sm_{arch}" for arch in sorted(set().union(*codes)))
        text = f"{gpu['name']} (sm_{sm}): anyflash's CUDA kernels were built for {built}. {instead}"
        return text, "build_for_gpu"
    if driver is None or not 0 < driver["version"] < min(needed):
        return None
    text = (
        f"{gpu['name']}: anyflash's CUDA kernels need NVIDIA driver {text_of(min(needed))} or "
        f"newer, this is {text_of(driver['version'])}. {instead}"
    )
    return text, "newer_driver"
