"""`python -m anyflash` as a program among others."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGPIPE")
@pytest.mark.parametrize(
    "arguments",
    [
        "doctor --no-probe",
        "info",
        "info --json",
        "explain",
        "explain --json",
        "demo --help",
        "--help",
    ],
)
def test_a_reader_that_leaves_ends_the_command_quietly(arguments):
    """`python -m anyflash info | head -1`, with a reader that leaves before the first line."""
    command = [sys.executable, "-m", "anyflash", *arguments.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        program.stdout.close()
        said = program.stderr.read()
    assert said == b""
    assert program.returncode == -signal.SIGPIPE
