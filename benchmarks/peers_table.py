"""What benchmarks.peers counts, prints and draws; pure, so that it is tested without the engines.

A row is one cell in one process: the seconds of a call by name ("anyflash", "sdpa", the engine),
and the rate that the machine reached beside it without attention (`limit`).
"""

from __future__ import annotations

import collections
import math
import pathlib
import statistics
from typing import Any, NamedTuple

GOAL = 1.1  # times as fast as the fastest engine, in every cell

Rows = list[dict[str, Any]]


class Cell(NamedTuple):
    """One problem: equally many queries and keys, or one query."""

    dtype: str
    head_dim: int
    causal: bool
    batch: int
    heads: int
    heads_k: int
    queries: int
    keys: int

    @property
    def decode(self) -> bool:
        return self.queries == 1

    @property
    def work(self) -> float:
        """Floating-point operations of a prefill; bytes of keys and values that decoding reads."""
        if self.decode:
            itemsize = 4 if self.dtype == "fp32" else 2
            return 2.0 * self.batch * self.keys * self.heads_k * self.head_dim * itemsize
        pairs = self.keys * (self.keys + 1) / 2 if self.causal else self.keys * self.keys
        return 4.0 * self.batch * self.heads * self.head_dim * pairs

    @property
    def kind(self) -> str:
        """What a row of the table holds."""
        if self.decode:
            return f"{self.dtype} decode {self.heads}/{self.heads_k}"
        return f"{self.dtype} {'causal' if self.causal else 'full'}"

    @property
    def line(self) -> str:
        """A row of the picture."""
        return self.kind if self.decode else f"{self.kind} d{self.head_dim}"

    @property
    def column(self) -> str:
        """A column of the picture."""
        return f"b{self.batch} {self.keys}" if self.decode else str(self.keys)

    def __str__(self) -> str:
        return f"{self.line} {self.column}"


class Result(NamedTuple):
    """A cell over all processes.

    Attributes:
        ratios: The engine's time divided by ours, by engine; the median over processes for SDPA.
        failed: What went wrong, by engine.
        share: Our rate as a share of what the machine reached; None where that is not known.
    """

    threads: int
    cell: Cell
    ratios: dict[str, float]
    failed: dict[str, str]
    share: float | None

    def __str__(self) -> str:
        return f"{self.cell}, {count(self.threads)}"

    @property
    def best(self) -> str:
        """The fastest engine."""
        return min(self.ratios, key=self.ratios.__getitem__)

    @property
    def ratio(self) -> float:
        """Beside the fastest engine."""
        return self.ratios[self.best]


def count(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def combine(rows: Rows) -> list[Result]:
    """Rows of several processes, one result for each number of threads and cell."""
    together: dict[tuple[int, Cell], Rows] = collections.defaultdict(list)
    for row in rows:
        together[row["threads"], Cell(**row["cell"])].append(row)
    results = []
    for (threads, cell), same in together.items():
        ratios: dict[str, list[float]] = collections.defaultdict(list)
        shares = []
        for row in same:
            ours = row["seconds"]["anyflash"]
            for name, seconds in row["seconds"].items():
                if name != "anyflash":
                    ratios[name].append(seconds / ours)
            if row["limit"]:
                shares.append(cell.work / ours / row["limit"])
        results.append(
            Result(
                threads,
                cell,
                {name: statistics.median(several) for name, several in ratios.items()},
                {name: why for row in same for name, why in row["failed"].items()},
                statistics.median(shares) if shares else None,
            )
        )
    return results


def markdown(results: list[Result], engines: list[str], weakest: int) -> str:
    """Worst and median ratio over the cells of a kind, our share of the limit for each head dim;
    then the weakest cells."""
    kinds: dict[tuple[int, str], list[Result]] = collections.defaultdict(list)
    for result in results:
        kinds[result.threads, result.cell.kind].append(result)
    heads = ["threads", "what", "cells", *engines, "the fastest of them", "of the limit, %"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for (threads, kind), same in sorted(kinds.items(), key=lambda item: item[0][0]):
        fields = [str(threads), kind, str(len(same))]
        for name in engines:
            fields.append(_worst_and_median([r.ratios[name] for r in same if name in r.ratios]))
            failed = sum(name in r.failed for r in same)
            fields[-1] += f" (**{failed} failed**)" if failed else ""
        fields.append(_worst_and_median([r.ratio for r in same if r.ratios]))
        fields.append(_share_by_head_dim(same))
        lines.append(f"| {' | '.join(fields)} |")
    compared = sorted((r for r in results if r.ratios), key=lambda r: r.ratio)
    below = sum(r.ratio < GOAL for r in compared)
    lines += ["", f"{below} of {len(compared)} cells are below {GOAL}x; the weakest:", ""]
    for r in compared[:weakest]:
        lines.append(f"- {r}: {r.ratio:.2f}x of {r.best}")
    failures = [(r, name, why) for r in results for name, why in r.failed.items()]
    if failures:
        lines += ["", "Failed:", ""]
        lines += [f"- {r}: {name}: {why}" for r, name, why in failures]
    return "\n".join(lines)


def _worst_and_median(ratios: list[float]) -> str:
    return f"{min(ratios):.2f}, {statistics.median(ratios):.2f}" if ratios else ""


def _share_by_head_dim(results: list[Result]) -> str:
    """The median share for each head dim."""
    shares: dict[int, list[float]] = collections.defaultdict(list)
    for r in results:
        if r.share is not None:
            shares[r.cell.head_dim].append(r.share)
    medians = (f"{100 * statistics.median(several):.0f}" for several in shares.values())
    return ", ".join(medians)


def draw(results: list[Result], engines: list[str], path: pathlib.Path) -> None:
    """For each number of threads the prefill above decoding; a panel for each engine and one for
    the share of the limit."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "anyflash", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    keys = sorted({(r.threads, r.cell.decode) for r in results})
    blocks = [(key, [r for r in results if (r.threads, r.cell.decode) == key]) for key in keys]
    heights = [len({r.cell.line for r in same}) + 2 for _, same in blocks]
    figure, grid = plt.subplots(
        len(blocks),
        len(engines) + 1,
        figsize=(3.4 * (len(engines) + 1), sum(heights) * 0.21),
        height_ratios=heights,
        sharey="row",
        squeeze=False,
        constrained_layout=True,
    )
    for axes, ((threads, decode), same) in zip(grid, blocks):
        what = f"{'decode' if decode else 'prefill'}, {count(threads)}"
        for axis, name in zip(axes, engines):
            values = {r.cell: r.ratios[name] for r in same if name in r.ratios}
            failed = [r.cell for r in same if name in r.failed]
            _panel(axis, [r.cell for r in same], values, failed, (0.25, 1, 4))
            axis.set_title(f"speed / {name}\n{what}", fontsize=8)
        shares = {r.cell: r.share for r in same if r.share is not None}
        _panel(axes[-1], [r.cell for r in same], shares, [], (0.25, 0.5, 1))
        limit = "read rate" if decode else "multiply-add peak"
        axes[-1].set_title(f"share of the {limit}\n{what}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def _panel(
    axis: Any,
    cells: list[Cell],
    values: dict[Cell, float],
    failed: list[Cell],
    scale: tuple[float, float, float],
) -> None:
    """Numbers on a field of colour: red, yellow and green at the three values of the scale."""
    rows = list(dict.fromkeys(cell.line for cell in cells))
    columns = list(dict.fromkeys(cell.column for cell in cells))
    table = [[math.nan] * len(columns) for _ in rows]
    for cell in cells:
        x, y = columns.index(cell.column), rows.index(cell.line)
        text = "failed" if cell in failed else ""
        if cell in values:
            value = values[cell]
            table[y][x] = math.log2(value / scale[1])
            text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
        axis.text(x, y, text, ha="center", va="center", fontsize=6)
    axis.set_facecolor("0.93")
    low, high = (math.log2(end / scale[1]) for end in scale[::2])
    axis.imshow(table, cmap="RdYlGn", vmin=low, vmax=high, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, fontsize=7)
    axis.set_yticks(range(len(rows)), rows, fontsize=7)
