"""The source tree, and which of its files are ours."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def tracked(*patterns: str) -> list[Path]:
    """The files that git tracks, by glob patterns like those of pathlib; at least one.

    Logs, notes and build outputs may lie beside them and are nobody's claim. Skips the test, or the
    module that asks, where git cannot tell.
    """
    command = ["git", "ls-files", "-z", "--", *(f":(glob){pattern}" for pattern in patterns)]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        pytest.skip(f"git does not say which files are ours: {reason}", allow_module_level=True)
    paths = (REPOSITORY / name for name in done.stdout.split("\0") if name)
    found = [path for path in paths if path.is_file()]  # others are deleted and not yet committed
    assert found, f"nothing tracked matches {patterns}"
    return found


def text_of(path: Path) -> str | None:
    """The text of a file; None where it holds something else."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
