"""What of the GPU benchmark can be right or wrong without a GPU: counts, ratios, tables, pages."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from support import REPOSITORY, has_attention_kernels

pytest.importorskip("torch.nn.attention.flex_attention")
sys.path.insert(0, str(REPOSITORY))

from benchmarks import gpu  # noqa: E402
from benchmarks.gpu import paged  # noqa: E402
from benchmarks.gpu_table import (  # noqa: E402
    Row,
    attention_flop,
    cache_bytes,
    measured_lines,
    table,
)


def make_row(**times: float) -> Row:
    return Row("forward", "head_dim 64 full 512", "TFLOP/s", 4e9, ("ours",), us=times, sm_mhz=1980)


def test_operations_of_a_forward():
    # two products of 512 x 512 x 64 multiply-adds per head
    assert attention_flop(3, 2, 512, 64, causal=False) == 3 * 2 * 2 * 2 * 512 * 512 * 64
    assert attention_flop(3, 2, 512, 64, causal=True) == 3 * 2 * 2 * 512 * 512 * 64


def test_bytes_of_a_decoding_step():
    assert cache_bytes(2, 4, 1000, 128, 2) == 2 * 4 * 1000 * 2 * 128 * 2


def test_rates():
    assert make_row(ours=10.0).rate("ours") == pytest.approx(400)  # 4 GFLOP in 10 us
    assert Row("", "", "GB/s", 1e6, (), us={"x": 10.0}).rate("x") == pytest.approx(100)


def test_the_ratio_is_to_the_best_of_the_others():
    row = make_row(ours=10.0, slow=40.0, fast=5.0)
    assert row.best == "fast"
    assert row.ratio("ours") == 0.5
    assert row.as_dict()["ratios"] == {"ours": 0.5}
    assert make_row(ours=10.0).ratio("ours") is None
    assert make_row(fast=10.0).ratio("ours") is None


def test_lines_of_measured_def():
    """Against the fastest route of this library, not against what else is measured."""

    def row(head_dim: int, dtype: str = "bf16", **times: float) -> Row:
        found = make_row(**times)
        found.point = ("forward", dtype, head_dim)
        return found

    rows = [
        row(128, ours=10.0, aten_flash=20.0),
        row(64, ours=10.0, aten_cudnn=12.0, aten_flash=11.0, sdpa=1.0),
        row(64, ours=10.0, aten_efficient=9.0, flex=2.0),
        row(64, ours=10.0, aten_flash=30.0),
        row(64, "fp16", ours=1.0, aten_flash=1.006),
        row(256, ours=10.0, flex=5.0),  # no route took it
        row(256, aten_flash=5.0),  # nor the kernel
        make_row(ours=10.0, aten_flash=1.0),  # no point of the grid
    ]
    assert measured_lines(90, rows) == [
        "MEASURED(90, forward, bf16, 64, 0.90, 1.10)",
        "MEASURED(90, forward, bf16, 128, 2.00, 2.00)",
        "MEASURED(90, forward, fp16, 64, 1.01, 1.01)",
    ]


def test_rows_are_json():
    row = make_row(ours=10.0, fast=5.0)
    row.refused["other"] = "no"
    found = json.loads(json.dumps(row.as_dict()))
    assert found["rates"] == {"ours": 400.0, "fast": 800.0}
    assert found["refused"] == {"other": "no"}
    assert found["sm_mhz"] == 1980


def test_table():
    row = make_row(fast=5.0, ours=10.0)
    other = make_row(fast=8.0)
    other.refused["ours"] = "because\nof this"
    assert table([row, other]).splitlines() == [
        "forward, TFLOP/s",
        "                         ours  fast  ratio   MHz",
        "head_dim 64 full 512      400   800   0.50  1980",
        "head_dim 64 full 512  refused   500         1980",
        "",
        "ours refused: because",
    ]


def test_pages_hold_the_cache():
    k, v = torch.randn(3, 64, 2, 8), torch.randn(3, 64, 2, 8)
    pages_k, pages_v, block_table = paged(k, v, 16)
    assert pages_k.shape == (12, 16, 2, 8)
    assert block_table.dtype == torch.int32
    assert sorted(block_table.flatten().tolist()) == list(range(12))
    assert torch.equal(pages_k[block_table.long()].reshape(k.shape), k)
    assert torch.equal(pages_v[block_table.long()].reshape(v.shape), v)


def test_rows_call_what_they_name(monkeypatch):
    """On a CPU: its kernel and plain SDPA run, and the routes of GPUs say why not."""
    if not has_attention_kernels("cpu"):
        pytest.skip("no attention kernels run here")

    class Clock:
        def us(self, call):
            call()
            return 1.0

        graph_us = us

    def randn(*shape, dtype, **options):
        return torch.randn(*shape, dtype=gpu.DTYPES[dtype], **options)

    small = dict(TOKENS=64, HIDDEN=128, SEQLENS=(32,), CONTEXTS=(256, 512))
    small |= dict(DECODE_TOKENS=512, ROTARY_CONTEXT=256, FEW_SEQLENS=(64,), FEW_CONTEXTS=(256,))
    small |= dict(FLEX_SEQLENS=(), FLEX_CONTEXTS=(), HEAD_DIMS=(64, 128), randn=randn)
    small |= dict(bias_activation_rows=lambda clock: iter(()), sm_mhz=lambda: None)
    for name, value in small.items():
        monkeypatch.setattr(gpu, name, value)
    for sm, points in (
        (75, ["forward fp16"]),
        (90, [f"{d} {t}" for d in ("forward", "backward") for t in ("bf16", "fp16")]),
    ):
        rows = list(gpu.rows(Clock(), sm))
        for row in rows:
            assert set(row.ours) <= set(row.us), row.refused
            if "append" not in row.ours:
                assert {"sdpa", *gpu.ROUTES} == {*row.us, *row.refused} - set(row.ours)
            for name, reason in row.refused.items():
                assert f"{name}: runs on cuda only" in reason
        grid = {row.point for row in rows if row.point is not None}
        assert grid == {(*point.split(), d) for point in points for d in (64, 128)}
        for row in rows:
            row.us["aten_flash"] = 2.0
        assert len(measured_lines(sm, rows)) == len(grid)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 3
    assert done.stderr == "no GPU that torch can use\n"
    assert list(tmp_path.iterdir()) == []
