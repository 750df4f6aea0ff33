"""Tells PyInstaller what an application takes along beside modules (entry point pyinstaller40)."""

from __future__ import annotations

import os


def hook_dirs() -> list[str]:
    """The folder of the hook-*.py files."""
    return [os.path.dirname(os.path.abspath(__file__))]
