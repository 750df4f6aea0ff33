"""The mutations that `make mutate` tries on the kernels: nothing that matters is left out."""

from __future__ import annotations

import pytest
from mutate import FILES, KVCACHE_APPEND, ROOT, compile_ptx, edits, mutations
from mutate_equivalent import EQUIVALENT


@pytest.mark.parametrize(
    ("line", "mutants"),
    (
        ("__syncthreads();", {";"}),
        ("ptx::cp_async_wait<1>();", {";", "ptx::cp_async_wait<1 + 1>();"}),
        (
            "if (row >= rows) return;",
            {"if (false) return;", "if (row > rows) return;"},
        ),
        ("if (x < y) f(x);", {"if (true) f(x);", "if (x <= y) f(x);"}),
        (
            "const bool wanted = exists && column(i + 1) < n;",
            {
                "const bool wanted = true && column(i + 1) < n;",
                "const bool wanted = exists && true;",
                "const bool wanted = exists && column(i + 1) <= n;",
            },
        ),
        (
            "return a == b ? f(a, b) : 0;",
            {"return true ? f(a, b) : 0;", "return false ? f(a, b) : 0;"},
        ),
        ("x = smaller(a + f(1, 2), b);", {"x = (a + f(1, 2));", "x = (b);"}),
        ("load<false>(tile);", {"load<true>(tile);"}),
    ),
)
def test_mutants_of_a_line(line, mutants):
    found = {line[:begin] + replacement + line[end:] for begin, end, replacement in edits(line)}
    assert found == mutants


def test_every_synchronisation_is_removed():
    for file in FILES:
        text = (ROOT / file).read_text()
        removed = [m.before for m in mutations(file) if m.after == ";"]
        for call in ("__syncthreads();", "__syncwarp();", "ptx::cp_async_commit();"):
            assert removed.count(call) == text.count(call)


def test_equivalent_mutants_exist():
    there = {
        (file.rpartition("/")[2], m.before, m.after) for file in FILES for m in mutations(file)
    }
    assert set(EQUIVALENT) <= there


def test_what_changes_no_code_is_the_same_ptx(tmp_path):
    """Or every mutant of one kernel would run all others."""
    (probe,) = KVCACHE_APPEND
    header = tmp_path / "kernels/elementwise/kvcache_append.cuh"
    header.parent.mkdir(parents=True)
    header.write_text("// moves the lines\n" + (ROOT / header.relative_to(tmp_path)).read_text())
    (tmp_path / "unchanged").mkdir()
    assert compile_ptx(probe, tmp_path) == compile_ptx(probe, tmp_path / "unchanged")
