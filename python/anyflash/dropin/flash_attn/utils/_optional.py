"""Packages that only some functions need."""

from __future__ import annotations

import importlib
from types import ModuleType


def load(module: str, purpose: str) -> ModuleType:
    """The module, or an ImportError that names its package and says what it is needed for."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{purpose} needs the package {package}, which can't be imported ({error})",
            name=package,
        ) from error
