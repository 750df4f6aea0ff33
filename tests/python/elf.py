"""What a compiled file says of itself, by binutils, which read those of other processors too."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def output(*command) -> str:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=True
    ).stdout


def exports(library: Path) -> set[str]:
    lines = map(str.split, output("nm", "-D", "--defined-only", library).splitlines())
    return {name for _, kind, name in lines if kind.isupper()}


def undefined(library: Path) -> set[str]:
    return {
        line.split()[-1].split("@")[0]
        for line in output("nm", "-D", "--undefined-only", library).splitlines()
    }


def needed(library: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-d", library)))


def runpath(library: Path) -> list[str]:
    return re.findall(r"\(RU?N?PATH\).*\[(.+)\]", output("readelf", "-d", library))


def processor(library: Path) -> str:
    return re.search(r"Machine:\s+(.+)", output("readelf", "-h", library)).group(1)


def newest(library: Path, prefix: str) -> tuple[int, ...]:
    """The newest version of glibc (GLIBC) or another library that is asked for."""
    versions = re.findall(rf"\b{prefix}_([\d.]+)", output("objdump", "-T", library))
    return max((tuple(map(int, v.split("."))) for v in versions), default=())
