"""Every copy of `flash_attn` this Python could import, which one wins, whether the others work.

Read-only and torch-free. Each other copy is probed in a fresh interpreter, so that a broken one
breaks only its probe.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

DROPIN = Path(__file__).resolve().parent / "dropin"
COMPANION = "_companion.py"  # what packaging/flash-attn puts into its copy

_PROBE = """
import sys
sys.path.insert(0, sys.argv[1])
try:
    import flash_attn
    from flash_attn import flash_attn_func
except BaseException as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(1)
print(getattr(flash_attn, "__version__", "unknown"))
"""


def survey(probe: bool = True) -> dict[str, Any]:
    """Looks along `sys.path` for `flash_attn`.

    Args:
        probe: Also try to import the copies that are not ours (one interpreter start each).

    Returns:
        winner: Folder that `import flash_attn` uses, or None; ours: whether that is the drop-in or
        its copy in the flash-attn wheel; companion: whether it is that copy;
        version: ``__version__`` of ours, None for others; import_error: why importing ours fails,
        or None; metadata_version: what `importlib.metadata` says; copies: list of {folder, ours,
        compiled, distribution, works, error}; hook: state of the start-up hook.
    """
    winner = _winner()
    copies = [_describe(folder, probe) for folder in _folders()]
    ours = winner is not None and is_ours(Path(winner))
    return {
        "winner": winner,
        "ours": ours,
        "companion": ours and (Path(winner or "") / COMPANION).is_file(),
        "version": _version(Path(winner)) if ours and winner else None,
        "import_error": _import_error() if ours else None,
        "metadata_version": _metadata_version(),
        "copies": copies,
        "hook": hook_state(),
    }


def is_ours(folder: Path) -> bool:
    """Whether a package `flash_attn` is the drop-in, or its copy in the flash-attn wheel."""
    return folder.resolve().parent == DROPIN or (folder / COMPANION).is_file()


def _version(folder: Path) -> str | None:
    found = re.search(r'^__version__ = "(.+)"$', (folder / "__init__.py").read_text(), re.MULTILINE)
    return found[1] if found else None


def _distribution(folder: Path) -> str | None:
    """The installed package that a folder `flash_attn` belongs to: "flash_attn-2.7.4"."""
    found = sorted(path.name for path in folder.parent.glob("flash_attn-*.dist-info"))
    return found[0][: -len(".dist-info")] if found else None


def say_passed_over(folders: list[str]) -> None:
    """Says which other packages `flash_attn` an import of ours has passed over: one line each."""
    for folder in map(Path, folders):
        if is_ours(folder):
            continue
        name = _distribution(folder) or "a flash_attn that no installed package owns"
        logging.getLogger("anyflash").warning(
            "anyflash: %s, in %s, is not used: anyflash's flash_attn comes first on the path. To "
            "use that one: ANYFLASH_DROPIN=append. What else to do: python -m anyflash doctor",
            name,
            folder.parent,
        )


def _winner() -> str | None:
    # Not importlib.util.find_spec: someone's stub may sit in sys.modules already.
    spec = importlib.machinery.PathFinder.find_spec("flash_attn")
    return str(Path(spec.origin).parent) if spec is not None and spec.origin else None


def _import_error() -> str | None:
    try:
        importlib.import_module("flash_attn")
    except Exception as error:  # noqa: BLE001 - any failure is the finding
        return f"{type(error).__name__}: {error}"
    return None


def _folders() -> list[Path]:
    """Folders on sys.path, and ours, that hold a package `flash_attn`; each once, in order."""
    parents = list(dict.fromkeys([*(Path(entry or os.getcwd()) for entry in sys.path), DROPIN]))
    folders = [
        parent / "flash_attn"
        for parent in parents
        if (parent / "flash_attn" / "__init__.py").is_file()
    ]
    return list({folder.resolve(): folder for folder in folders}.values())


def _describe(folder: Path, probe: bool) -> dict[str, Any]:
    parent, ours = folder.parent, is_ours(folder)
    compiled = sorted(
        p.name for p in parent.glob("flash_attn_2_cuda*") if p.suffix in (".so", ".pyd")
    )
    copy: dict[str, Any] = {
        "folder": str(folder), "ours": ours, "compiled": compiled,
        "distribution": _distribution(folder),
        "works": None, "error": None,
    }  # fmt: skip
    if probe and not ours:
        copy["works"], copy["error"] = _probe(parent)
    return copy


def _probe(parent: Path) -> tuple[bool, str | None]:
    environment = {**os.environ, "ANYFLASH_DROPIN": "0"}
    command = [sys.executable, "-c", _PROBE, str(parent)]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    if run.returncode == 0:
        return True, None
    lines = (run.stdout.strip() or run.stderr.strip()).splitlines()
    return False, lines[-1] if lines else f"the interpreter ended with code {run.returncode}"


def _metadata_version() -> str | None:
    try:
        return importlib.metadata.version("flash_attn")
    except importlib.metadata.PackageNotFoundError:
        return None


def hook_state() -> dict[str, Any]:
    """The start-up hook: installed (its anyflash.pth), setting, on_path, path_index."""
    site_folders = [Path(entry) for entry in sys.path if entry]
    pth = [
        str(folder / "anyflash.pth")
        for folder in site_folders
        if (folder / "anyflash.pth").is_file()
    ]
    index = next(
        (i for i, entry in enumerate(sys.path) if entry and Path(entry).resolve() == DROPIN), None
    )
    return {
        "installed": pth[0] if pth else None,
        "setting": os.environ.get("ANYFLASH_DROPIN"),
        "on_path": index is not None,
        "path_index": index,
    }
