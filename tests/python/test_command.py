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
    """On the least shared memory that the GPUs of a kernel have."""
    command = [sys.executable, "-m", "anyflash", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tiles = json.loads(done.stdout)["tiles"]
    for arch, shared_kb in (("sm75", 64), ("sm80", 100)):
        for direction, kernels in (
            ("forward", ("forward",)),
            ("backward", ("backward, dk and dv", "backward, dq alone")),
        ):
            compiled = {
                int(entry.fields[3])
                for entry in _defs.entries("instances")
                if entry.macro == "ATTENTION" and entry.fields[:2] == (arch, direction)
            }
            for kernel in kernels:
                there = {
                    tile["max_head_dim"]
                    for tile in tiles
                    if tile["kernel"] == kernel and tile["shared_kb"] == shared_kb
                }
                assert there == compiled, (arch, kernel)
