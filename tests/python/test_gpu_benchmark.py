"""What of the GPU benchmark can be right or wrong without a GPU: counts, ratios, tables, pages."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from support import REPOSITORY

pytest.importorskip("torch.nn.attention.flex_attention")
sys.path.insert(0, str(REPOSITORY))

from benchmarks.gpu import paged  # noqa: E402
from benchmarks.gpu_table import Row, attention_flop, cache_bytes, table  # noqa: E402


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 3
    assert done.stderr == "no GPU that torch can use\n"
    assert list(tmp_path.iterdir()) == []
