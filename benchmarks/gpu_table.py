"""What the GPU benchmark counts, compares and prints; pure, so that it is tested without a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

from benchmarks.measure import measured_line

#: PyTorch's attention routines on a GPU, as this library calls them.
ROUTES = ("aten_cudnn", "aten_flash", "aten_efficient")


def attention_flop(batch: int, heads: int, seqlen: int, head_dim: int, causal: bool) -> float:
    """Operations of a forward over equally long q and k; half of them under a causal mask."""
    return 4.0 * batch * heads * seqlen * seqlen * head_dim * (0.5 if causal else 1.0)


#: Operations of a backward, in forwards.
BACKWARD = 2.5


def cache_bytes(batch: int, heads_k: int, seqlen_k: int, head_dim: int, itemsize: int) -> float:
    """Bytes of keys and values that one decoding step reads."""
    return 2.0 * batch * heads_k * seqlen_k * head_dim * itemsize


@dataclasses.dataclass
class Row:
    """One problem, timed on everything that accepts it.

    Attributes:
        group: Rows of a group are printed as one table.
        shape: The problem in words.
        unit: "TFLOP/s" or "GB/s".
        work: Floating-point operations, or bytes, of one call.
        ours: Which of the names below are this library's.
        us: Microseconds of one call by name.
        refused: Why others have no time, by name.
        sm_mhz: Clock of the multiprocessors right after the measurement, if it can be read.
        point: Direction, dtype and head_dim, of rows that are points of core/measured.def's grid.
    """

    group: str
    shape: str
    unit: str
    work: float
    ours: tuple[str, ...]
    us: dict[str, float] = dataclasses.field(default_factory=dict)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    sm_mhz: Optional[int] = None
    point: Optional[tuple[str, str, int]] = None

    def rate(self, name: str) -> float:
        """In the row's unit."""
        return self.work / self.us[name] * {"TFLOP/s": 1e-6, "GB/s": 1e-3}[self.unit]

    @property
    def best(self) -> str | None:
        """The fastest of the others."""
        others = [name for name in self.us if name not in self.ours]
        return min(others, key=self.us.__getitem__) if others else None

    def ratio(self, name: str) -> float | None:
        """How many times as fast as the best of the others."""
        if name not in self.us or self.best is None:
            return None
        return self.us[self.best] / self.us[name]

    def gain(self) -> float | None:
        """How many times as fast as the fastest route: what a choice of the kernel gains."""
        routes = [self.us[name] for name in ROUTES if name in self.us]
        return min(routes) / self.us[self.ours[0]] if routes and self.ours[0] in self.us else None

    def as_dict(self) -> dict[str, Any]:
        rates = {name: round(self.rate(name), 2) for name in self.us}
        ratios = {name: round(self.ratio(name) or 0, 3) for name in self.ours if self.ratio(name)}
        return {**dataclasses.asdict(self), "rates": rates, "best": self.best, "ratios": ratios}


def _cell(row: Row, name: str) -> str:
    if name in row.us:
        return f"{row.rate(name):.0f}"
    return "refused" if name in row.refused else ""


def _lines(rows: list[Row]) -> list[str]:
    """The table of one group: rates, and ours divided by the best of the others."""
    names = list(dict.fromkeys(name for row in rows for name in (*row.us, *row.refused)))
    ours = [name for name in names if name in rows[0].ours]
    names = ours + [name for name in names if name not in ours]
    table = [
        ["", *names, *(f"{name} / best" if len(ours) > 1 else "ratio" for name in ours), "MHz"]
    ]
    for row in rows:
        ratios = [row.ratio(name) for name in ours]
        table.append(
            [
                row.shape,
                *(_cell(row, name) for name in names),
                *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                str(row.sm_mhz or ""),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [f"{rows[0].group}, {rows[0].unit}"]
    for first, *others in table:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:]))
        lines.append("  ".join((first.ljust(widths[0]), *cells)).rstrip())
    return lines


def table(rows: list[Row]) -> str:
    """All groups as aligned text, and below them why something refused."""
    lines: list[str] = []
    for group in dict.fromkeys(row.group for row in rows):
        lines += [*_lines([row for row in rows if row.group == group]), ""]
    reasons = {(n, r.splitlines()[0][:300]) for row in rows for n, r in row.refused.items() if r}
    return "\n".join(lines + [f"{name} refused: {reason}" for name, reason in sorted(reasons)])


def measured_lines(sm: int, rows: list[Row]) -> list[str]:
    """The lines of core/measured.def for a GPU of this compute capability."""
    ratios: dict[tuple[str, str, int], list[float]] = {}
    for row in rows:
        gain = row.gain()
        if row.point is not None and gain is not None:
            ratios.setdefault(row.point, []).append(gain)
    return [measured_line(str(sm), *point, ratios[point]) for point in sorted(ratios)]
