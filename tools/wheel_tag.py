"""What a wheel may be called: on which systems its libraries can be loaded.

The operators are not looked at: only torch 2.10 and newer opens them, which needs newer systems
than they do.
"""

from __future__ import annotations

import pathlib
import re

from build_plan import machine

# manylinux2014: the newest version of each that its systems have.
MANYLINUX2014 = {
    b"GLIBC": (2, 17),
    b"GLIBCXX": (3, 4, 19),
    b"CXXABI": (1, 3, 7),
    b"GCC": (4, 8, 0),
}
KERNELS = "libanyflash_kernels.so"


def needed_versions(library: pathlib.Path) -> dict[bytes, tuple[int, ...]]:
    """The newest version of each system library that the dynamic linker will ask for."""
    newest: dict[bytes, tuple[int, ...]] = {}
    names = b"|".join(MANYLINUX2014)
    for name, version in re.findall(rb"\0(%s)_([0-9.]+)(?=\0)" % names, library.read_bytes()):
        numbers = tuple(map(int, version.split(b".")))
        newest[name] = max(newest.get(name, ()), numbers)
    return newest


def platform_tag(package: pathlib.Path) -> str:
    """The platform part of the wheel's name, for the libraries in a folder; "any" without one.

    Both names of manylinux2014 where it applies: `pip download --platform` compares the words.
    """
    library = package / KERNELS
    if not library.is_file():
        return "any"
    family = machine()
    needed = needed_versions(library)
    if all(version <= MANYLINUX2014[name] for name, version in needed.items()):
        return f"manylinux2014_{family}.manylinux_2_17_{family}"
    return f"linux_{family}"
