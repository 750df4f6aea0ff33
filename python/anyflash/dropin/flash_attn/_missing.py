"""Names of upstream's that anyflash cannot provide: they are absent, and asking says what works."""

from __future__ import annotations

import opcode
import sys
from typing import Any, Callable


def absent(module: str, names: dict[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that lacks some of upstream's names.

    ``hasattr`` stays False. An attribute raises AttributeError and ``from module import name``
    ImportError, as without anyflash, but both say what to use instead.

    Args:
        module: ``__name__`` of the module.
        names: what is absent, and a clause about it, such as "a Triton kernel; apply_rotary
            computes the same on every device".

    Returns:
        A function to be assigned to ``__getattr__``.
    """

    def get_attribute(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        text = f"{module}.{name}: anyflash does not provide it: {names[name]}"
        if _is_import(sys._getframe(1)):
            raise ImportError(text, name=module)
        raise AttributeError(text)

    return get_attribute


def _is_import(frame: Any) -> bool:
    """Whether the frame is at ``from ... import ...``, which replaces the text of an
    AttributeError by one of its own."""
    return frame.f_code.co_code[frame.f_lasti] == opcode.opmap["IMPORT_FROM"]
