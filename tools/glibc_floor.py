"""Stub libraries that let a binary linked on glibc >= 2.34 load on older systems.

glibc 2.34 moved libpthread, libdl and librt into libc and gave the moved symbols the version
GLIBC_2.34. libc keeps the old versions, but a linker picks the new one. A stub that defines a
symbol with its old version under its old library's name, and stands before libc on the link line,
makes the linker record what every glibc offers.

usage: glibc_floor.py <C++ compiler> <output folder>
prints the stubs as a CMake list (empty where none is needed)
"""

from __future__ import annotations

import collections
import pathlib
import re
import subprocess
import sys

HOMES = {
    "libpthread.so.0": r"(pthread|sem)_",
    "libdl.so.2": r"dl(open|sym|vsym|close|error|addr|info|mopen)",
    "librt.so.1": r"shm_",
}
MOVED = (2, 34)


def symbol_versions(libc: str) -> dict[str, set[tuple[int, ...]]]:
    """Every symbol that libc defines, with the versions it has."""
    versions: dict[str, set[tuple[int, ...]]] = collections.defaultdict(set)
    dump = subprocess.run(
        ["objdump", "-T", libc], capture_output=True, text=True, check=True
    ).stdout
    for version, name in re.findall(r"\(?GLIBC_([0-9.]+)\)?\s+(\w+)$", dump, re.MULTILINE):
        versions[name].add(tuple(map(int, version.split("."))))
    return versions


def write_stub(
    compiler: str, folder: pathlib.Path, soname: str, symbols: dict[str, str]
) -> pathlib.Path:
    """One library of empty functions, each with the given version."""
    stem = folder / soname.split(".")[0]
    by_version = collections.defaultdict(list)
    for name, version in sorted(symbols.items()):
        by_version[version].append(name)
    script = "".join(
        f"{version} {{ global: {'; '.join(names)}; }};\n" for version, names in by_version.items()
    )
    stem.with_suffix(".map").write_text(script)
    source = stem.with_suffix(".c")
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in sorted(symbols)))
    library = stem.with_suffix(".so")
    flags = [
        "-w",
        "-x",
        "c",
        "-fno-builtin",
        "-shared",
        "-nostdlib",
        "-fPIC",
        f"-Wl,-soname,{soname}",
    ]
    command = [
        compiler,
        *flags,
        f"-Wl,--version-script={stem.with_suffix('.map')}",
        str(source),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    return library


def main(compiler: str, folder: str) -> None:
    libc = subprocess.run(
        [compiler, "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not pathlib.Path(libc).is_file():  # not glibc
        return
    out = pathlib.Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    stubs = []
    versions = symbol_versions(libc)
    for soname, pattern in HOMES.items():
        old = {
            name: max(v for v in have if v < MOVED)
            for name, have in versions.items()
            if re.match(pattern, name) and MOVED in have and min(have) < MOVED
        }
        if old:
            symbols = {
                name: "GLIBC_" + ".".join(map(str, version)) for name, version in old.items()
            }
            stubs.append(str(write_stub(compiler, out, soname, symbols)))
    print(";".join(stubs))


if __name__ == "__main__":
    main(*sys.argv[1:])
