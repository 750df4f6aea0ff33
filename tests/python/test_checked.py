"""What has passed on a GPU: the lists that say so, what follows from them, and who writes them."""

from __future__ import annotations

import pathlib
import re
import sys

import pytest
from support import REPOSITORY, torch_version

import anyflash
from anyflash import _core, _defs
from anyflash._defs import Entry

sys.path.append(str(REPOSITORY / "scripts"))
import checked  # noqa: E402
import dispatch_table  # noqa: E402

ROUTES = {entry.fields[0]: entry.fields for entry in _defs.entries("routes")}
WAITING = [name for name, row in ROUTES.items() if row[1] == "sdpa_once_checked"]
GPUS = (75, 80, 86, 90, 100, 103, 110, 120)


def record(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Puts other lines in the place of core/checked_routes.def, for Python alone."""
    entries = _defs.entries
    found = tuple(Entry("CHECKED", tuple(line.split())) for line in lines)
    monkeypatch.setattr(_defs, "entries", lambda n: found if n == "checked_routes" else entries(n))


def test_lines_are_of_routes_that_wait():
    found = [entry.fields for entry in _defs.entries("checked_routes")]
    assert {name for name, *_ in found} == set(WAITING)
    assert len({line[:2] for line in found}) == len(found)
    for name, sm, passed in found:
        assert int(sm) >= int(ROUTES[name][3])
        assert passed == "none" or int(passed) >= int(ROUTES[name][7])


def test_every_list_is_one_of_an_installed_package():
    """_defs reads it from there too."""
    from shared_lists import LISTS

    assert "core/checked_routes.def" in LISTS


@pytest.mark.providers
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("sm", GPUS)
def test_a_route_waits_until_it_has_passed(sm, direction):
    """C++ chooses as Python reads the lines."""
    passed = {
        name: int(torch)
        for name, gpu, torch in (entry.fields for entry in _defs.entries("checked_routes"))
        if int(gpu) == sm and torch != "none"
    }
    for torch in (209, 210, 211, 213, 215):
        problem = {
            "op": "attention", "device": "cuda", "sm": sm, "direction": direction, "dtype": "bf16",
            "head_dim": 64, "head_dim_v": 64, "features": ["lse"], "torch_version": torch,
        }  # fmt: skip
        for name in WAITING:
            found = anyflash.decide({**problem, "order": ["sdpa"], "explicit": True})
            named = anyflash.decide({**problem, "order": [name], "explicit": True})
            if sm < int(ROUTES[name][3]):
                assert named["route"] == "none"
                continue
            assert named["route"] == name
            if passed.get(name, torch + 1) <= torch:
                assert found["route"] == name
            else:
                why = f"has not been checked on sm_{sm} with torch {torch // 100}.{torch % 100} yet"
                why += f"; naming `{name}` selects it all the same"
                assert found["reasons"][0] == (name, why)
                assert found["route"] == "aten_flash"


def test_the_lines_of_a_check(monkeypatch):
    here = torch_version()
    if here < 209:
        pytest.skip("this torch has no cuDNN route")
    if _core.library is None:
        pytest.skip("no library that decides")
    line = f"CHECKED(aten_cudnn, 90, {here})"
    for passed, lines in (
        ("none", [line]), (str(here + 1), [line]), (str(here), []), (str(here - 1), []),
    ):  # fmt: skip
        record(monkeypatch, f"aten_cudnn 90 {passed}", "aten_cudnn 103 none")
        assert checked.routes(90) == lines
        assert checked.routes(120) == []
    record(monkeypatch, "aten_cudnn 80 none")  # where it cannot run
    assert checked.routes(80) == []


def test_the_page_says_where_a_route_has_passed(monkeypatch):
    def shown() -> str:
        return next(line for line in dispatch_table.routes().splitlines() if "`aten_cudnn`" in line)

    record(monkeypatch, "aten_cudnn 90 none")
    assert "| by name only |" in shown()
    record(monkeypatch, "aten_cudnn 90 211", "aten_cudnn 100 none", "aten_cudnn 103 212")
    assert "| `sdpa` on sm_90 from torch 2.11, sm_103 from torch 2.12; else by name |" in shown()


def test_the_lines_of_the_grid_leave_those_of_gpus(monkeypatch, tmp_path):
    sys.path.insert(0, str(REPOSITORY))
    from benchmarks import grid

    path = pathlib.Path(tmp_path / "measured.def")
    gpu = "MEASURED(90, forward, bf16, 64, 1.00, 1.10)\n"
    path.write_text(f"// text\n{gpu}MEASURED(avx2, forward, fp32, 128, 1.00, 1.00)\n")
    monkeypatch.setattr(grid, "MEASURED", path)
    points = [{"dtype": "fp32", "head_dim": 64, "forward": ratio} for ratio in (2.0, 3.0, 4.0)]
    grid.write_table({"avx2": points})
    cpu = "MEASURED(avx2, forward, fp32, 128, 2.00, 3.00)\n"
    assert path.read_text() == f"// text\n{gpu}{cpu}"


def test_the_check_keeps_routes_apart():
    """A route that fails does not keep the kernels from being recorded, nor they it."""
    text = (REPOSITORY / "scripts/gpu_check.sh").read_text()
    assert re.findall(r'-k "?([^"\n]*aten_cudnn)', text) == [
        *["not " + name for name in WAITING * 2],
        *WAITING * 2,
    ]
