"""Reads the lists that C++ and Python share: the .def files of csrc/, core/ and kernels/.

An installed package has their text in the module ``_lists``, which setup.py writes: applications
that are frozen or zipped take modules along, and no other files.
"""

from __future__ import annotations

import functools
import pathlib
import re
from typing import NamedTuple

_SOURCE = pathlib.Path(__file__).resolve().parents[2]
_ENTRY = re.compile(r"^(\w+)\((.*)\)\s*(?://.*)?$")
_FIELD = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[^,"]*)\s*(?:,|$)')


class Entry(NamedTuple):
    """One line of a list: ``MACRO(field, "field", ...)``, quotes removed."""

    macro: str
    fields: tuple[str, ...]


def _text_of(name: str) -> str:
    """The list as it is written: in the source tree around this package, or as installed.

    Raises:
        ImportError: neither place has it.
    """
    for folder in ("csrc", "core", "kernels", "kernels/sm80"):
        path = _SOURCE / folder / f"{name}.def"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    from ._lists import LISTS

    return LISTS[name]


def _fields(text: str) -> tuple[str, ...]:
    fields = []
    position = 0
    while position < len(text):
        match = _FIELD.match(text, position)
        if match is None:
            raise ValueError(f"cannot read the fields of: {text}")
        field = match.group(1).strip()
        fields.append(re.sub(r"\\(.)", r"\1", field[1:-1]) if field.startswith('"') else field)
        position = match.end()
    return tuple(fields)


@functools.cache
def entries(name: str) -> tuple[Entry, ...]:
    """The entries of ``schemas``, ``routes``, ``features``, ..., in the order of the file."""
    found = []
    for line in _text_of(name).splitlines():
        match = _ENTRY.match(line)
        if match is not None:
            found.append(Entry(match.group(1), _fields(match.group(2))))
    return tuple(found)


# By macro of sm80/tiles.def and sm80/backward_tiles.def: the kernel, and what the columns say.
_TILES = {
    "TILE": ("forward", "max_head_dim shared_kb rows keys warps"),
    "KEY_TILE": (
        "backward, dk and dv",
        "max_head_dim shared_kb rows keys score_warps key_warps query_warps q_buffers "
        "v_in_registers",
    ),
    "QUERY_TILE": ("backward, dq alone", "max_head_dim shared_kb rows keys warps q_in_registers"),
}


def tiles() -> list[tuple[str, dict[str, int]]]:
    """(kernel, columns) of each tile of the attention kernels for GPUs, the preferred one of a
    head dim first. shared_kb: of a multiprocessor, at least."""
    found = []
    for entry in (*entries("tiles"), *entries("backward_tiles")):
        kernel, columns = _TILES[entry.macro]
        found.append((kernel, dict(zip(columns.split(), map(int, entry.fields)))))
    return found


class Operator(NamedTuple):
    """One line of schemas.def."""

    group: str  # "leaf", "differentiable", "public" or "refusal"
    where: str  # "everywhere" or "cpu"
    name: str
    schema: str


def operators() -> tuple[Operator, ...]:
    """Every operator of the library."""
    return tuple(
        Operator(group, where, name, f"{name}{schema}")
        for group, where, name, schema in (
            entry.fields for entry in entries("schemas") if entry.macro == "OPERATOR"
        )
    )


def device_keys() -> tuple[str, ...]:
    """The dispatch keys of devices."""
    return tuple(e.fields[0] for e in entries("schemas") if e.macro == "DEVICE_KEY")


@functools.cache
def feature_phrases() -> dict[str, str]:
    """How a reason names each feature, in the order of features.def."""
    return {e.fields[0]: e.fields[1] for e in entries("features") if e.macro == "FEATURE"}


@functools.cache
def features(text: str) -> frozenset[str]:
    """The features in a column: names and names of sets, joined by ``|``."""
    sets = {e.fields[0]: e.fields[1] for e in entries("features") if e.macro == "FEATURE_SET"}
    names = "|".join(sets.get(part.strip(), part) for part in text.split("|"))
    return frozenset(part.strip() for part in names.split("|"))
