"""The numbers that Python writes into the core's records mean there what they mean here; sizes are
compared whenever the library is loaded."""

from __future__ import annotations

import pytest
import torch

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
