"""Which back end computes a call: names, orders, and the context manager that chooses.

An order of back ends is a comma list, ``"kernel,sdpa,math"``. The first of these that says
something counts: the ``backend=`` argument of a call, ``with anyflash.backend(...)``,
``ANYFLASH_BACKEND``, the default order.
"""

from __future__ import annotations

import contextvars
import functools
import os
from typing import Any

#: Digit of each back end in the code of an order, as in core/problem.h.
CODES: dict[str, int] = {
    "kernel": 1,
    "sdpa": 2,
    "math": 3,
    "aten_cudnn": 4,
    "aten_flash": 5,
    "aten_efficient": 6,
    "aten_cpu": 7,
    "aten_sdpa": 8,
}
NAMES: dict[int, str] = {code: name for name, code in CODES.items()}
DEFAULT_ORDER = ("kernel", "sdpa", "math")
DEFAULT_CODE = 0x321
#: Instruction sets of CPUs, as in kernels/arch.h.
ISAS = ("none", "avx2", "avx512", "avx512bf16", "amx", "neon")
_MAX_NAMES = 15  # digits of a positive int64

_chosen: contextvars.ContextVar[int] = contextvars.ContextVar("anyflash_backend", default=0)


def parse_order(spec: str) -> tuple[str, ...]:
    """The names in a comma list; ``auto`` stands for the default order, empty for no choice.

    Raises:
        ValueError: a name that no back end has.
    """
    names: list[str] = []
    for name in (part.strip() for part in spec.split(",")):
        if name == "auto":
            names += DEFAULT_ORDER
        elif name in CODES:
            names.append(name)
        elif name:
            known = ", ".join(("auto", *CODES))
            raise ValueError(f"unknown back end '{name}'; known: {known}")
    if len(names) > _MAX_NAMES:
        raise ValueError(f"back ends: at most {_MAX_NAMES} names, got '{spec}'")
    return tuple(names)


def code_of(names: tuple[str, ...]) -> int:
    """The order as one number: a hexadecimal digit per name, first choice lowest."""
    return sum(CODES[name] << (4 * place) for place, name in enumerate(names))


def order_names(code: int) -> tuple[str, ...]:
    """The names in the code of an order.

    Raises:
        ValueError: a digit that no back end has.
    """
    names = []
    rest = code
    while rest != 0:
        if code < 0 or rest & 0xF not in NAMES:
            raise ValueError(
                f"backend: expected an order of back ends 1 to {len(CODES)} in hexadecimal digits, "
                f"got {code}"
            )
        names.append(NAMES[rest & 0xF])
        rest >>= 4
    return tuple(names)


def is_set(variable: str) -> bool:
    """True for an environment variable that is neither empty nor 0."""
    return os.environ.get(variable, "") not in ("", "0")


def environment_order() -> tuple[str, ...]:
    """The order of ANYFLASH_BACKEND, or the default one; ANYFLASH_STRICT=1 keeps its first name.

    Raises:
        ValueError: ANYFLASH_BACKEND names an unknown back end.
    """
    try:
        names = parse_order(os.environ.get("ANYFLASH_BACKEND", "")) or DEFAULT_ORDER
    except ValueError as error:
        raise ValueError(f"ANYFLASH_BACKEND: {error}") from None
    return names[:1] if is_set("ANYFLASH_STRICT") else names


@functools.cache
def environment_code() -> int:
    """The order code of the environment, read once, as the core reads it.

    Raises:
        ValueError: ANYFLASH_BACKEND names an unknown back end.
    """
    return code_of(environment_order())


def order_code(spec: str | None = None, strict: bool | None = None) -> int:
    """The number that operators take as ``backend``.

    Args:
        spec: comma list of back ends; None: nothing chosen here, so the environment decides.
        strict: only the first name counts, and a call it cannot run is an error. None: what
            ANYFLASH_STRICT says.

    Returns:
        The order code; 0 where nothing is chosen.

    Raises:
        ValueError: an unknown name.
        TypeError: ``spec`` is not a string.
    """
    if spec is None:
        return code_of(environment_order()[:1]) if strict else 0
    if not isinstance(spec, str):
        raise TypeError(
            f"backend: expected a string such as 'sdpa,math', got {type(spec).__name__}"
        )
    names = parse_order(spec)
    if is_set("ANYFLASH_STRICT") if strict is None else strict:
        names = names[:1]
    return code_of(names)


def current_code() -> int:
    """The order code chosen by the innermost ``with anyflash.backend(...)``; 0 outside."""
    return _chosen.get()


def resolve(spec: str | None) -> int:
    """The order code for a call's ``backend`` argument."""
    return current_code() if spec is None else order_code(spec)


# torch.compile evaluates it while it traces and keeps the result: the choice is that of the first
# call.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


class backend:  # noqa: N801  (used as a function: ``with anyflash.backend("sdpa"):``)
    """Chooses the back ends for the calls inside a ``with`` block, per thread and per task.

    Args:
        spec: comma list of ``kernel``, ``sdpa``, ``math``, ``aten_cudnn``, ``aten_flash``,
            ``aten_efficient``, ``aten_cpu``, ``aten_sdpa``, or ``auto``.
        strict: a call that the first name cannot run is an error.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, spec: str | None = None, *, strict: bool | None = None) -> None:
        self.code = order_code(spec, strict)
        self._tokens: list[contextvars.Token[int]] = []

    def __enter__(self) -> backend:
        self._tokens.append(_chosen.set(self.code))
        return self

    def __exit__(self, *exception: Any) -> None:
        _chosen.reset(self._tokens.pop())
