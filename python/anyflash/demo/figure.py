"""The picture of the demo: both loss curves, and the times."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a back end without a display

if TYPE_CHECKING:
    from .embedding import Embedded
    from .language_model import Trained

OURS, THEIRS, THIRD = "#1f6f8b", "#d1603d", "#e8b298"


def draw(path: pathlib.Path, embedded: Embedded, trained: Trained) -> None:
    """Writes the PNG."""
    figure, (curves, differences, times) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    steps = range(1, len(trained.losses_ours) + 1)
    curves.plot(
        steps, trained.losses_ours, color=OURS, linewidth=4, alpha=0.5, label="flash_attn, packed"
    )
    curves.plot(
        steps, trained.losses_plain, color=THEIRS, linewidth=1.2, label="plain SDPA, padded"
    )
    curves.set(
        title="Character model: training loss", xlabel="step", ylabel="cross entropy per character"
    )
    curves.legend(frameon=False)

    gaps = [abs(a - b) for a, b in zip(trained.losses_ours, trained.losses_plain)]
    differences.plot(steps, gaps, color=OURS, linewidth=1)
    differences.set(
        title="Difference between the two losses", xlabel="step", ylabel="absolute difference"
    )

    bars = {
        "embedding:\nflash_attn, packed": (embedded.fp32.ours, OURS),
        "embedding:\nown, padded": (embedded.fp32.own, THEIRS),
        "embedding:\nown, sorted": (embedded.fp32.own_sorted, THIRD),
        "training:\nflash_attn, packed": (trained.seconds_ours, OURS),
        "training:\nSDPA, padded": (trained.seconds_plain, THEIRS),
    }
    names = list(bars)[::-1]
    drawn = times.barh(
        names, [bars[name][0] for name in names], color=[bars[name][1] for name in names]
    )
    times.bar_label(drawn, fmt="%.1f s", padding=3)
    times.set(title="Time, this machine", xlabel="seconds")
    times.margins(x=0.15)
    for axes in (curves, differences, times):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
