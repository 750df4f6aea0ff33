"""What of the benchmark beside other engines can be right or wrong without them."""

from __future__ import annotations

import json
import re
import sys
import time

import pytest
from support import REPOSITORY

sys.path.insert(0, str(REPOSITORY))

from benchmarks import peers_measure  # noqa: E402
from benchmarks.measure import interleaved  # noqa: E402
from benchmarks.peers_engines import ENGINES, Engine, Sdpa  # noqa: E402
from benchmarks.peers_table import Cell, combine, draw, markdown  # noqa: E402

PREFILL = Cell("fp32", 64, False, 2, 3, 3, 64, 64)
CAUSAL = Cell("fp32", 64, True, 2, 3, 3, 64, 64)
DECODE = Cell("bf16", 64, False, 2, 4, 2, 1, 100)


def make_row(cell: Cell, threads: int = 1, limit: float | None = None, **seconds: float) -> dict:
    failed = {"openvino": "differs from ours by 1.0e+00"} if "openvino" not in seconds else {}
    return {
        "threads": threads,
        "cell": cell._asdict(),
        "seconds": seconds,
        "limit": limit,
        "failed": failed,
    }


def test_work():
    assert PREFILL.work == 2 * 3 * 2 * 2 * 64 * 64 * 64  # two products of multiply-adds
    assert CAUSAL.work == 2 * 3 * 2 * 2 * 64 * (64 * 65 / 2)
    assert DECODE.work == 2 * (2 * 100 * 2 * 64) * 2  # bytes of keys and values


def test_the_ratio_is_to_the_fastest_engine():
    (result,) = combine([make_row(PREFILL, anyflash=2.0, sdpa=8.0, openvino=3.0)])
    assert (result.best, result.ratio) == ("openvino", 1.5)
    assert result.ratios == {"sdpa": 4.0, "openvino": 1.5}


def test_processes_come_together():
    rows = [
        make_row(PREFILL, anyflash=1.0, sdpa=2.0, openvino=3.0, limit=PREFILL.work * 2),
        make_row(PREFILL, anyflash=1.0, sdpa=4.0, zentorch=2.5, limit=PREFILL.work * 4),
        make_row(PREFILL, threads=2, anyflash=1.0, sdpa=9.0, openvino=1.0),
    ]
    one, two = combine(rows)
    assert one.ratios == {"sdpa": 3.0, "openvino": 3.0, "zentorch": 2.5}
    assert one.share == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert (two.threads, two.ratios["sdpa"], two.share) == (2, 9.0, None)


def test_table_and_picture(tmp_path):
    rows = [
        make_row(PREFILL, anyflash=1.0, sdpa=2.0, openvino=0.5, limit=PREFILL.work * 2),
        make_row(CAUSAL, anyflash=1.0, sdpa=3.0),
        make_row(DECODE, threads=2, anyflash=1.0, sdpa=12.0, openvino=1.5),
    ]
    results = combine(json.loads(json.dumps(rows)))
    text = markdown(results, ["sdpa", "openvino"], weakest=1)
    assert "| 1 | fp32 full | 1 | 2.00, 2.00 | 0.50, 0.50 | 0.50, 0.50 | 50 |" in text
    assert "| 1 | fp32 causal | 1 | 3.00, 3.00 |  (**1 failed**) | 3.00, 3.00 |  |" in text
    assert "| 2 | bf16 decode 4/2 | 1 | 12.00, 12.00 |" in text
    assert "1 of 3 cells are below 1.1x" in text
    assert "- fp32 full d64 64, 1 thread: 0.50x of openvino" in text
    assert "- fp32 causal d64 64, 1 thread: openvino: differs from ours by 1.0e+00" in text
    pytest.importorskip("matplotlib")
    pictures = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for picture in pictures:
        draw(results, ["sdpa", "openvino"], picture)
    assert pictures[0].read_text() == pictures[1].read_text()
    assert ">failed<" in pictures[0].read_text()


class Wrong(Sdpa):
    """A mask that nobody asked for, or half of the keys."""

    def prefill(self, q, k, v, causal):
        return super().prefill(q, k, v, not causal)

    def decode(self, q, k, v):
        return super().decode(q, k[:, 50:], v[:, 50:])


class Broken(Engine):
    def prefill(self, q, k, v, causal):
        raise NotImplementedError("no such kernel\nat all")

    def decode(self, q, k, v):
        return self.prefill(q, k, v, False)


@pytest.mark.parametrize("cell", [PREFILL, CAUSAL, DECODE], ids=str)
def test_a_time_counts_only_with_the_right_output(cell, device, monkeypatch):
    if device != "cpu":
        pytest.skip("runs with --device cpu")
    monkeypatch.setattr(peers_measure, "SECONDS", 0)
    monkeypatch.setattr(peers_measure, "READ", 1000)
    engines = {"right": Sdpa(1), "wrong": Wrong(1), "broken": Broken(1)}
    row = peers_measure.measure(cell, engines, peers_measure.Limits(None, 1))
    assert set(row["seconds"]) == {"anyflash", "right"}
    assert row["failed"]["wrong"].startswith("differs from ours by")
    assert row["failed"]["broken"] == "NotImplementedError: no such kernel"
    assert (row["limit"] is not None) == cell.decode
    json.dumps(row)


def test_refused_dtypes_have_a_reason():
    assert peers_measure.refusal(Sdpa(1), "bf16") is None
    assert peers_measure.refusal(Broken(1), "bf16") == "no such kernel"


@pytest.mark.parametrize("small", [False, True])
def test_grid_has_no_cell_twice(small):
    cells = list(peers_measure.cells("bf16", 2, small))
    assert len({cell.line + cell.column for cell in cells}) == len(cells)
    assert all(cell.heads >= 2 for cell in cells)


def test_every_package_is_pinned():
    pins = (REPOSITORY / "benchmarks/peers.txt").read_text()
    for engine in ENGINES.values():
        for package in engine.packages:
            assert re.search(rf"^{package}==", pins, re.MULTILINE), package


def test_interleaved_pauses_and_does_not_call_warm_functions_again():
    calls = []
    began = time.perf_counter()
    interleaved(lambda: calls.append(1), seconds=0, least=2, pause=0.01, warm=True)
    assert len(calls) == 2
    assert time.perf_counter() - began >= 0.02
