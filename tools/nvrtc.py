"""NVRTC, the CUDA compiler that is a library: found or fetched, and compiled with.

No toolkit and no C++ compiler is needed. Machine code of CUDA 12.x is loaded by every driver since
R525, that of 13.x by R580 and newer, so an older NVRTC is the better one: 12.4 for GPUs that it
knows, 12.8 for Blackwell (sm_100, sm_120). In this order: $ANYFLASH_NVRTC (libraries, joined by
colons); what `fetch` put beside this Python or a build into its folder; a fetch of it; where that
fails, the oldest of what else is installed (NVIDIA's packages, which torch brings along; toolkits).

usage: nvrtc.py fetch FOLDER                the two versions, a folder each
       nvrtc.py find FOLDER ARCH...         one line per architecture: 80 12.4 <library>; fetches
                                            into FOLDER what is missing; status 1 where one has none
       nvrtc.py compile LIBRARY ARCH SOURCE OUTPUT [OPTION...]
                                            ARCH: sm_80 for machine code, compute_80 for PTX
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import importlib.util
import os
import pathlib
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from typing import NamedTuple

PACKAGE = "nvidia-cuda-nvrtc-cu12"
PINS = ("12.4.127", "12.8.93")
OLDEST = (12, 0)

# What every source of ours is compiled with. Launchers stand behind the kernels in the same file:
# what they launch is instantiated, and they themselves, as unused device functions, are dropped.
OPTIONS = ("-std=c++17", "-default-device")


class NvrtcError(Exception):
    """A library that cannot be used, or a source that does not compile; the text is NVRTC's."""


class Compiled(NamedTuple):
    code: bytes  # a cubin, or PTX
    log: str  # warnings, and what ptxas was asked to say


@contextlib.contextmanager
def kept_locale() -> Iterator[None]:
    """NVRTC 12.4 leaves the thread in the C locale (12.8 does not), and Python would read what
    programs write as ASCII."""
    libc = ctypes.CDLL(None)
    libc.uselocale.restype, libc.uselocale.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    before = libc.uselocale(None)
    try:
        yield
    finally:
        libc.uselocale(before)


class Nvrtc:
    """One library."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise NvrtcError(str(error)) from error
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    @functools.cached_property
    def archs(self) -> frozenset[int]:
        """The compute capabilities it knows: 75, 80, ..."""
        count = ctypes.c_int()
        self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._library.nvrtcGetSupportedArchs(found)
        return frozenset(found)

    def compile(self, source: pathlib.Path, arch: str, options: Iterable[str] = ()) -> Compiled:
        """Compiles a file.

        Args:
            source: CUDA; what it includes is looked for in the folders of ``-I`` options.
            arch: ``sm_80`` for a cubin, ``compute_80`` for PTX.

        Raises:
            NvrtcError: it does not compile.
        """
        lib, program = self._library, ctypes.c_void_p()
        text, name = source.read_bytes(), str(source).encode()
        lib.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None)
        flags = [flag.encode() for flag in (f"-arch={arch}", *OPTIONS, *options)]
        array = (ctypes.c_char_p * len(flags))(*flags)
        try:
            with kept_locale():
                failed = lib.nvrtcCompileProgram(program, len(flags), array)
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode().strip()
            if failed:
                raise NvrtcError(log or f"NVRTC error {failed}")
            is_ptx = arch.startswith("compute_")
            code = self._read(program, "PTX" if is_ptx else "CUBIN")
            return Compiled(code.rstrip(b"\0") if is_ptx else code, log)
        finally:
            lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self._library, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw


def pin_for(sm: int) -> str:
    """The version whose machine code most drivers load."""
    return PINS[0] if sm < 100 else PINS[1]


def fetched(folder: pathlib.Path) -> Iterator[str]:
    yield from sorted(glob.glob(f"{folder}/*/nvidia/cuda_nvrtc/lib/libnvrtc.so.*"))


def beside_python() -> pathlib.Path:
    """Where `make setup` has it fetched."""
    return pathlib.Path(sys.prefix) / "nvrtc"


def fetch(folder: pathlib.Path, version: str) -> str:
    """Installs a version of the package into a folder of its own; the library's path.

    Raises:
        NvrtcError: pip could not get it.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    command += ["--disable-pip-version-check", "--target", str(folder / version)]
    try:
        subprocess.run([*command, f"{PACKAGE}=={version}"], check=True, stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NvrtcError(f"{PACKAGE} {version} could not be fetched: {error}") from error
    return next(path for path in fetched(folder) if f"/{version}/" in path)


@functools.cache
def fetched_now(folder: pathlib.Path, version: str) -> str | None:
    """The same, once, and None where it failed, which is said."""
    try:
        return fetch(folder, version)
    except NvrtcError as error:
        print(error, file=sys.stderr)
        return None


def installed() -> Iterator[str]:
    """Libraries of NVIDIA's Python packages and of toolkits."""
    spec = importlib.util.find_spec("nvidia")
    packages = list(spec.submodule_search_locations or []) if spec else []
    packages.append(f"{sysconfig.get_paths()['purelib']}/nvidia")  # pip's isolated build hides it
    folders = [f"{package}/*/lib" for package in packages]
    toolkits = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders += [f"{toolkit}/lib*" for toolkit in toolkits if toolkit]
    for folder in folders:
        yield from sorted(glob.glob(f"{folder}/libnvrtc.so.*"))


@functools.cache
def opened(paths: tuple[str, ...]) -> list[Nvrtc]:
    """Those that can be used, oldest first."""
    found = []
    for path in paths:
        try:
            library = Nvrtc(path)
        except NvrtcError:
            continue
        if library.version >= OLDEST:
            found.append(library)
    return sorted(found, key=lambda library: library.version)


def find(sm: int, folder: pathlib.Path | None = None) -> Nvrtc | None:
    """The NVRTC for an architecture.

    Args:
        sm: compute capability: 75, 80, ...
        folder: fetch into it what is missing; None: what is there must do.
    """

    def first(paths: Iterable[str]) -> Nvrtc | None:
        return next((library for library in opened(tuple(paths)) if sm in library.archs), None)

    if chosen := os.environ.get("ANYFLASH_NVRTC"):
        return first(chosen.split(os.pathsep))
    there = list(fetched(beside_python())) + (list(fetched(folder)) if folder else [])
    if library := first(there):
        return library
    pin = pin_for(sm)
    if folder is not None and not (folder / pin).exists():
        path = fetched_now(folder, pin)
        if path is not None and (library := first([path])):
            return library
    return first(installed())


def main(command: str, *arguments: str) -> int:
    if command == "fetch":
        for version in PINS:
            print(fetch(pathlib.Path(arguments[0]), version))
        return 0
    if command == "find":
        for arch in arguments[1:]:
            library = find(int(arch.rstrip("af")), pathlib.Path(arguments[0]))
            if library is None:
                chosen = os.environ.get("ANYFLASH_NVRTC")
                where = f" in ANYFLASH_NVRTC={chosen}" if chosen else ""
                print(f"no NVRTC for sm_{arch}{where}", file=sys.stderr)
                return 1
            print(arch, "{}.{}".format(*library.version), library.path)
        return 0
    path, arch, source, output, *options = arguments
    try:
        compiled = Nvrtc(path).compile(pathlib.Path(source), arch, options)
    except NvrtcError as error:
        print(error, file=sys.stderr)
        return 1
    if compiled.log:
        print(compiled.log, file=sys.stderr)
    pathlib.Path(output).write_bytes(compiled.code)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
