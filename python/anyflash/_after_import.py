"""What is to happen to a module of another package once it is imported, by whomever: importing it
beforehand would cost every program the time."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module, once: now if it is there, else when it has been imported.

    Args:
        name: Of the module.
        function: Called with the module.
    """

    def __init__(self, name: str, function: Callable[[ModuleType], None]) -> None:
        self.name, self.function = name, function
        module = sys.modules.get(name)
        if module is None:
            sys.meta_path.insert(0, self)
        else:
            function(module)

    def cancel(self) -> None:
        """It will not be called, unless it has been."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Finds the module as everybody else, and calls the function after its code has run."""
        if name != self.name:
            return None
        self.cancel()
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.function(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
