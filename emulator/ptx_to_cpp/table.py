"""The table of instructions, which the modules of handlers fill."""

from __future__ import annotations

from typing import Callable

from .operands import Operands
from .parse import Instruction

Handler = Callable[[Instruction, Operands], str]
HANDLERS: dict[str, Handler] = {}


def instruction(*opcodes: str) -> Callable[[Handler], Handler]:
    """Makes a function the handler of these opcodes, which writes C++ statements."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(opcodes, handler))
        return handler

    return register
