"""Brings the operators into the process: those of the binary where it can be used, else those
written in Python.

The choice is made before anything is opened. Nothing here raises: what went wrong is kept in
``reasons`` for ``python -m anyflash doctor``.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import pathlib
import zlib
from typing import Any

import torch

from . import _core
from ._files import KERNELS, LIBRARY, build_facts, why_not_built

MIN_TORCH = 210  # 2.10, the stable ABI that the binary is built against
_PROVIDERS = ("auto", "binary", "python")
_PROBE = "anyflash::_flash_attn_forward"
_LAST_PROBE = "anyflash::fused_mlp"  # the last operator of schemas.def

#: Whose operators are in use: "binary", "python", or "none": before load(), or when even Python's
#: could not be defined.
provider = "none"
#: Why the binary is not in use, and anything else that did not go as planned.
reasons: list[str] = []

_loaded = False
_keep_alive: list[Any] = []  # operator definitions and callbacks live as long as these objects


def _is_defined(operator: str) -> bool:
    return bool(torch._C._jit_get_schemas_for_operator(operator))


def damage(path: pathlib.Path) -> str | None:
    """What is wrong with the file of a library; to open a damaged one could end the process.

    The whole file is read for that, which the next lines do anyway: about a millisecond.
    """
    noted = build_facts().get("crc32", {}).get(path.name)
    if noted is None:  # an editable installation, whose libraries are rebuilt by hand as well
        return None
    content = path.read_bytes()
    if (found := zlib.crc32(content)) == noted:
        return None
    return (
        f"{path.name} is damaged: the checksum of its {len(content)} bytes is {found:08x}, that of "
        f"the file that was built is {noted:08x}"
    )


def _obstacle_to(path: pathlib.Path) -> str | None:
    """Why a library is not opened; None: nothing speaks against it."""
    if not path.is_file():
        return f"{path.name} is not there: {why_not_built()}"
    try:
        return damage(path)
    except OSError as error:
        return f"{path.name} cannot be read: {error}"


def _open_core() -> str | None:
    """Loads the core and the kernels; returns what is in the way."""
    obstacle = _obstacle_to(KERNELS) or _core.open_library(KERNELS)
    if obstacle is None:
        _install_notice_sink(_core.loaded())
    return obstacle


def _obstacle_to_binary() -> str | None:
    """Why the compiled operators are not opened; None: nothing speaks against them."""
    if _core.library is None:
        return f"{LIBRARY.name} needs {KERNELS.name}"
    if _core.torch_version() < MIN_TORCH:
        wanted = ".".join(map(str, divmod(MIN_TORCH, 100)))
        return f"the binary needs torch {wanted} or newer, this is {torch.__version__}"
    return _obstacle_to(LIBRARY)


def _open_binary() -> str | None:
    """Loads the binary; returns what went wrong."""
    was_defined = _is_defined(_PROBE)
    try:
        torch.ops.load_library(str(LIBRARY))
        library = ctypes.CDLL(str(LIBRARY))
        register_error = library.anyflash_register_error
    except (OSError, AttributeError) as error:
        return f"{LIBRARY.name} cannot be loaded: {error.__cause__ or error}"
    _keep_alive.append(library)
    register_error.restype = ctypes.c_char_p
    error_text = register_error()
    if error_text:
        text = f"{LIBRARY.name} did not register its operators: {error_text.decode()}"
        if not was_defined:
            return text
        reasons.append(text)
    return None


def show_info() -> None:
    """ANYFLASH_VERBOSE=1: also what runs where all is well, on stderr unless the program has a log
    of its own."""
    logger = logging.getLogger("anyflash")
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: not logging.getLogger().handlers)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _install_notice_sink(library: ctypes.CDLL) -> None:
    """Sends the core's notices to the logger `anyflash`."""
    logger = logging.getLogger("anyflash")

    @ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_char_p)
    def sink(level: int, text: bytes) -> None:
        logger.log(level, "%s", text.decode(errors="replace"))

    set_sink = library.anyflash_set_notice_sink
    set_sink(ctypes.cast(sink, ctypes.c_void_p))
    _keep_alive.append(sink)
    atexit.register(set_sink, None)  # the interpreter ends before the library


def _define_python() -> str | None:
    """Defines the operators in Python; returns what went wrong."""
    if _is_defined(_PROBE):
        return "operators of the name anyflash:: exist already; those are in use"
    from . import _python_ops

    try:
        try:
            library = torch.library.Library("anyflash", "FRAGMENT")
        except ValueError:  # torch 2.0
            library = torch.library.Library("anyflash", "DEF")
        _keep_alive.append(library)
        _python_ops.register(library)
    except Exception as error:  # noqa: BLE001 - the import goes on, doctor tells
        return f"the Python operators cannot be defined: {type(error).__name__}: {error}"
    return None


def _load_operators() -> str:
    if obstacle := _open_core():
        reasons.append(obstacle)
    wanted = os.environ.get("ANYFLASH_PROVIDER") or "auto"
    if wanted not in _PROVIDERS:
        reasons.append(f"ANYFLASH_PROVIDER: expected {', '.join(_PROVIDERS)}, got '{wanted}'")
        wanted = "auto"
    if wanted == "python":
        reasons.append("ANYFLASH_PROVIDER=python")
    else:
        obstacle = _obstacle_to_binary() or _open_binary()
        if obstacle is None:
            return "binary"
        reasons.append(obstacle)
    problem = _define_python()
    if problem is None:
        return "python"
    reasons.append(problem)
    return "binary" if _is_defined(_PROBE) and _is_defined(_LAST_PROBE) else "none"


def has_kernels() -> bool:
    """Whether the operators in use know the compiled kernels."""
    return _core.library is not None


def cpu_isa() -> str:
    """The instruction set that kernels may use on this CPU; "none" without kernels.

    Raises:
        ValueError: ANYFLASH_CPU_ISA names an unknown one, or one that this CPU does not have.
    """
    return _core.cpu_isa()[0] if has_kernels() else "none"


def cpu_isa_is_lowered() -> bool:
    """Whether ANYFLASH_CPU_ISA keeps kernels from what this CPU has. Raises like cpu_isa."""
    return has_kernels() and _core.cpu_isa()[1]


def load() -> str:
    """Loads the operators once and returns the provider: "binary", "python" or "none"."""
    global _loaded, provider
    if not _loaded:
        _loaded = True
        try:
            provider = _load_operators()
        except Exception as error:  # noqa: BLE001 - an import of anyflash never fails here
            reasons.append(f"loading the operators failed: {type(error).__name__}: {error}")
    return provider
