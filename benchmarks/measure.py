"""How every benchmark measures: medians of interleaved runs in one process, beside a reference."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any, Callable

import anyflash


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: What is measured, with its unit.
        ours: The figure of anyflash.
        reference: The figure it stands beside; None where the goal is absolute.
        ratio: reference / ours for times, ours / reference for rates, so that more is better; None
            without a reference.
        goal: The figure to reach, in words.
        met: Whether it is reached.
    """

    name: str
    ours: float
    reference: float | None
    ratio: float | None
    goal: str
    met: bool

    @classmethod
    def speed(cls, name: str, ours: float, reference: float, at_least: float) -> Row:
        """A row whose goal is a ratio: ours may take at most reference / at_least."""
        ratio = reference / ours
        return cls(name, ours, reference, ratio, f">= {at_least:g}x", ratio >= at_least)

    @classmethod
    def rate(cls, name: str, ours: float, reference: float, at_least: float) -> Row:
        """A row of rates whose goal is a ratio: ours is at least reference * at_least."""
        ratio = ours / reference
        return cls(name, ours, reference, ratio, f">= {at_least:g}x", ratio >= at_least)

    @classmethod
    def share(cls, name: str, ours: float, reference: float, at_least: float) -> Row:
        """A row of rates whose goal is a share of the reference; ratio is that share."""
        ratio = ours / reference
        return cls(name, ours, reference, ratio, f">= {at_least:.0%}", ratio >= at_least)

    @classmethod
    def part(cls, name: str, ours: float, reference: float, at_most: float) -> Row:
        """A row of costs whose goal is a share of the reference: ours may be at most that."""
        goal = f"<= {at_most:.0%} of it"
        return cls(name, ours, reference, reference / ours, goal, ours <= at_most * reference)

    @classmethod
    def excess(cls, name: str, ours: float, reference: float, at_most: float, unit: str) -> Row:
        """A row whose goal is a difference: ours - reference in the unit of the figures."""
        goal = f"<= {at_most:g} {unit} more"
        return cls(name, ours, reference, reference / ours, goal, ours - reference <= at_most)

    @classmethod
    def limit(cls, name: str, ours: float, at_most: float, unit: str) -> Row:
        """A row whose goal is an absolute figure."""
        return cls(name, ours, None, None, f"<= {at_most:g} {unit}", ours <= at_most)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def accelerated(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function with PyTorch's scaled_dot_product_attention on anyflash's kernels."""

    def run() -> Any:
        with anyflash.accelerate_sdpa():
            return function()

    return run


def interleaved(
    *functions: Callable[[], Any],
    seconds: float = 4.0,
    least: int = 5,
    number: int = 1,
    pause: float = 0.0,
    warm: bool = False,
) -> list[float]:
    """Median seconds per call of each function.

    Rounds call every function in turn, so that a machine that slows down slows all of them.

    Args:
        *functions: Called without arguments.
        seconds: About how long all rounds together take.
        least: Rounds at the least.
        number: Calls per timing, for functions of microseconds.
        pause: Seconds to wait before each timing, for functions that leave threads spinning.
        warm: They have all been called before; else each is called once, unmeasured.
    """
    if not warm:
        for function in functions:
            function()
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < end:
        for shift in range(len(functions)):
            index = (rounds + shift) % len(functions)
            if pause:
                time.sleep(pause)
            began = time.perf_counter()
            for _ in range(number):
                functions[index]()
            times[index].append((time.perf_counter() - began) / number)
        rounds += 1
    return [statistics.median(row) for row in times]


def measured_line(
    level: str, direction: str, dtype: str, max_head_dim: int, ratios: list[float]
) -> str:
    """The line of core/measured.def for these points of a grid."""
    worst, median = min(ratios), statistics.median(ratios)
    fields = f"{level}, {direction}, {dtype}, {max_head_dim}, {worst:.2f}, {median:.2f}"
    return f"MEASURED({fields})"


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes of CPU tensors that a call holds at once, beside those that are there before.

    Counted from the profiler's log of allocations, so that a busy machine doesn't show.
    """
    from torch.profiler import ProfilerActivity, profile

    function()  # what is made once is there before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        function()
    events = run.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [event for event in events if event.name() == "[memory]"]
    now = highest = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()
        highest = max(highest, now)
    return highest


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    width = max([len(row.name) for row in rows] + [4])
    lines = [f"{'name':{width}s} {'ours':>10s} {'reference':>10s} {'ratio':>7s}  goal"]
    for row in rows:
        reference = "" if row.reference is None else f"{row.reference:.4g}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        mark = "met" if row.met else "NOT MET"
        lines.append(
            f"{row.name:{width}s} {row.ours:10.4g} {reference:>10s} {ratio:>7s}  {row.goal}: {mark}"
        )
    return "\n".join(lines)
