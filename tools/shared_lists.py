"""The lists that C++ and Python share, as a Python module for installed packages.

What freezes or zips an application takes modules along, and no other files.
"""

from __future__ import annotations

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
LISTS = (
    "csrc/schemas.def",
    "core/routes.def",
    "core/checked_routes.def",
    "core/measured.def",
    "kernels/features.def",
    "kernels/instances.def",
    "kernels/sm80/tiles.def",
    "kernels/sm80/backward_tiles.def",
    "kernels/drivers.def",
    "kernels/checked.def",
)


def write_lists(package: pathlib.Path) -> None:
    """Writes ``_lists.py``, which anyflash/_defs.py reads where there is no source tree."""
    lists = {path.stem: path.read_text(encoding="utf-8") for path in map(ROOT.joinpath, LISTS)}
    entries = "".join(f"    {name!r}: {text!r},\n" for name, text in lists.items())
    head = '"""Written by tools/shared_lists.py."""'
    (package / "_lists.py").write_text(f"{head}\n\nLISTS = {{\n{entries}}}\n", encoding="utf-8")
