"""`python -m anyflash` as a program among others."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from anyflash import _defs


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


def test_info_lists_a_tile_for_every_gpu_and_head_dim():
    """The sm_80 forward on the least shared memory that its GPUs have, 100 KB."""
    command = [sys.executable, "-m", "anyflash", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tiles = json.loads(done.stdout)["sm80_tiles"]
    compiled = {
        int(entry.fields[3])
        for entry in _defs.entries("instances")
        if entry.macro == "ATTENTION" and entry.fields[0] == "sm80"
    }
    assert {tile["max_head_dim"] for tile in tiles if tile["shared_kb"] == 100} == compiled
