"""The numbers that Python writes into the core's records mean there what they mean here; sizes are
compared whenever the library is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tree import tracked

from anyflash import _core, _records
from anyflash._activations import ACTIVATIONS
from anyflash._operators import record_of

pytestmark = pytest.mark.skipif(_core.library is None, reason="there is no kernel library")


@pytest.mark.parametrize(("number", "route"), [*enumerate(_records.ROUTES)])
def test_routes(number, route):
    assert _core.loaded().anyflash_route_name(number).decode() == route


def test_families_directions_and_dtypes():
    """An instance is called after its own."""
    rows = _core.instances()
    assert rows
    for row in rows:
        assert row["name"].startswith(f"{row['family']}_{row['direction']}_{row['dtype']}_"), row


@pytest.mark.parametrize(("number", "name"), [*enumerate(ACTIVATIONS)])
def test_activations(number, name):
    assert _core.activation_number(name) == number


@pytest.mark.parametrize("dtype", [x for x in _records._DTYPES if not x.is_floating_point])
def test_dtypes_of_tensors(dtype):
    record = record_of(_records.NormCall, {"x": torch.zeros(2, 2, dtype=dtype)})
    with pytest.raises(RuntimeError, match=f"got {str(dtype).removeprefix('torch.')}$"):
        _core.prepare("norm", record, None, finds_kernel=False)


def _members(text: str, name: str) -> list[str]:
    """The data members of a struct in a C++ header, in order."""
    match = re.search(rf"^struct {name} \{{\n(.*?)^\}};", text, re.M | re.S)
    assert match is not None, name
    body = re.sub(r"//.*", "", match.group(1))
    body = re.sub(r"^  [^;{}]*\)( const)? \{.*?(\}$|^  \}$)", "", body, flags=re.M | re.S)
    body = re.sub(r"enum class .*?\};", "", body, flags=re.S)
    names = []
    for statement in body.split(";"):
        statement = re.sub(r"\s*=.*|\{\}", "", " ".join(statement.split()))
        pointer = re.search(r"\(\*(\w+)\)", statement)
        declared = statement.split(" ", 1)[1] if " " in statement else ""
        plain = re.findall(r"\*?(\w+)(?:\[\w+\])?(?:,|$)", declared)
        names += [pointer.group(1)] if pointer else plain
    return names


#: Where Python's name is another one.
RENAMED = {"Choice": {"route": ["route_number"]}, "DecisionView": {"measured": ["worst", "median"]}}


@pytest.mark.parametrize("record", _records.MIRRORED, ids=lambda record: record.__name__)
def test_fields_stand_in_the_order_of_the_header(record):
    headers = [*tracked("core/*.h"), *tracked("kernels/*.h")]
    name = record.__name__
    text = next(t for t in map(Path.read_text, headers) if f"\nstruct {name} {{" in t)
    renamed = RENAMED.get(name, {})
    written = [new for member in _members(text, name) for new in renamed.get(member, [member])]
    assert [field for field, *_ in record._fields_] == written
