"""Writes what README.md takes from other pages: figures, a picture of them, and versions.

    python scripts/readme.py           # README.md and docs/figures.svg
    python scripts/readme.py --check   # exit 1 if one of them is not current

The figures come from docs/benchmarks.md, the versions from docs/test_matrix.md.
"""

from __future__ import annotations

import math
import pathlib
import re
import sys
from typing import NamedTuple

from dispatch_table import current
from draw_kernels import Picture

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]
BENCHMARKS = CHECKOUT / "docs/benchmarks.md"
MATRIX = CHECKOUT / "docs/test_matrix.md"
PICTURE = CHECKOUT / "docs/figures.svg"
README = CHECKOUT / "README.md"

# Row of docs/benchmarks.md: (what a reader calls it, what PyTorch does instead).
ROWS = {
    "dense fp32 b2 h8 s1024 d64, forward (ms)": (
        "fp32, forward", "SDPA"),
    "dense fp32 causal b2 h8 s1024 d64, forward+backward (ms)": (
        "fp32, causal, forward + backward", "SDPA"),
    "dense bf16 causal b2 h8 s1024 d64, forward+backward (ms)": (
        "bf16, causal, forward + backward", "SDPA"),
    "packed bf16, 16 sequences of 32..1024, h8 d64 vs padded SDPA, forward (ms)": (
        "bf16, 16 packed sequences", "padded SDPA"),
    "dense fp16 causal b2 h8 s1024 d64, forward+backward (ms)": (
        "fp16, causal, forward + backward", "SDPA"),
    "window 256 of s4096 bf16 causal b1 h8 d64 vs SDPA with a mask, forward (ms)": (
        "bf16, window of 256 in 4096", "SDPA with a mask"),
}  # fmt: skip
IN_README = [name for name in ROWS if "bf16" in name]
# Rows of rates, with and without accelerate_sdpa: (the package, what its model does).
MODELS = {
    "transformers GPT-2 4 x 512 bf16, batch 8, 64 tokens up to 1024 (tokens/s)": (
        "transformers", "a small GPT-2 writes, context 1024, batch 8"),
    "transformers GPT-2 4 x 512 bf16, the same padded, static cache (tokens/s)": (
        "transformers", "the same, padded prompts and a static cache"),
    "transformers BERT 6 x 384 bf16, batches of 32 sentences by length (tokens/s)": (
        "transformers", "a small BERT embeds sentences"),
    "timm vit_small_patch16_224 bf16, batch 8 (images/s)": (
        "timm", "ViT-S/16 looks at images"),
    "diffusers DiT 6 x 384 bf16, latents of 64 x 64 (steps/s)": (
        "diffusers", "a small DiT denoises 64 x 64 latents"),
}  # fmt: skip


class Figure(NamedTuple):
    """One row of the benchmarks, in milliseconds."""

    label: str
    instead: str
    ours: float
    reference: float

    @property
    def ratio(self) -> float:
        return self.reference / self.ours

    def times(self) -> tuple[str, str]:
        return tuple(f"{ms:.1f}" if ms < 100 else f"{ms:.0f}" for ms in (self.ours, self.reference))


def measured() -> tuple[str, dict[str, tuple[float, float]]]:
    """The machine, and (ours, reference) of the rows of ROWS and MODELS."""
    text = BENCHMARKS.read_text()
    machine = re.search(r"^(.*threads, torch \d+\.\d+)", text, re.MULTILINE)
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return machine[1], {name[2:]: (float(ours), float(reference))
                        for name, ours, reference, *_ in cells
                        if name[2:] in ROWS or name[2:] in MODELS}  # fmt: skip


def attention_figures() -> dict[str, Figure]:
    """Those of ROWS."""
    _, rows = measured()
    return {name: Figure(*ROWS[name], *rows[name]) for name in ROWS}


def draw() -> str:
    """Bars: how many times as fast as PyTorch, on a logarithmic scale."""
    machine, _ = measured()
    rows = attention_figures()
    left, top, step, unit = 250, 70, 40, 74  # unit: the width of a factor of two
    height = top + step * len(rows) + 50
    picture = Picture(900, height)
    picture.text(
        20, 28, "Attention on the CPU, times as fast as PyTorch's", anchor="start", size=17
    )
    picture.text(
        20,
        48,
        f"{machine}; SDPA is scaled_dot_product_attention",
        anchor="start",
        size=12,
        fill="#555",
    )
    for power in range(6):
        x = left + power * unit
        picture.lines.append(
            f'<line x1="{x}" y1="{top - 6}" x2="{x}" y2="{height - 40}" stroke="#ccc"/>'
        )
        label = "PyTorch" if power == 0 else f"{2**power}x"
        picture.text(x, height - 22, label, size=12, fill="#555")
    for i, figure in enumerate(rows.values()):
        y, width = top + i * step, unit * math.log2(figure.ratio)
        ours, reference = figure.times()
        picture.text(left - 12, y + 19, figure.label, anchor="end")
        picture.box(left, y, round(width, 1), 28, "#4e79a7")
        beside = f"{figure.ratio:.1f}x: {ours} ms, {figure.instead} {reference} ms"
        picture.text(round(left + width + 8, 1), y + 19, beside, anchor="start", size=12)
    return picture.svg()


def figures() -> str:
    """The figures of the README."""
    rows = attention_figures()
    lines = ["| bf16 on a CPU | anyflash | PyTorch | |", "| --- | --- | --- | --- |"]
    for row in (rows[name] for name in IN_README):
        ours, reference = row.times()
        cells = (row.label.replace("bf16, ", ""), f"{ours} ms", f"{reference} ms, {row.instead}")
        lines.append(f"| {' | '.join(cells)} | **{row.ratio:.1f}x** |")
    return "\n".join(lines)


def _rate(x: float) -> str:
    return f"{x:.3g}" if x < 100 else f"{x:.0f}"


def models() -> str:
    """Models of other packages, before and after accelerate_sdpa."""
    machine, rows = measured()
    lines = [f"| bf16, {machine} | before | after | |", "| --- | --- | --- | --- |"]
    for name, (package, job) in MODELS.items():
        unit = name[name.rindex("(") + 1 : -1]
        after, before = rows[name]
        cells = (f"{package}: {job}", f"{_rate(before)} {unit}", _rate(after))
        lines.append(f"| {' | '.join(cells)} | **{after / before:.1f}x** |")
    return "\n".join(lines)


def versions() -> str:
    """Which torch and Python were run, with which operators."""
    lines = ["| torch | Python | operators | `torch.compile` |", "| --- | --- | --- | --- |"]
    table = [line.strip("| ").split(" | ") for line in MATRIX.read_text().splitlines()]
    names = next(cells for cells in table if cells[0] == "torch")
    for cells in table:
        if not cells[0][:1].isdigit():
            continue
        row = dict(zip(names, cells))
        kind = {"binary": "compiled", "python": "Python"}[row["operators"]]
        graph = row["compile"].split(", ")[-1]
        lines.append(f"| {row['torch'].partition('+')[0]} | {row['Python']} | {kind} | {graph} |")
    return "\n".join(lines)


TABLES = {"figures": figures, "models": models, "versions": versions}


def main() -> int:
    made = {PICTURE: draw(), README: current(README, TABLES, "readme.py")}
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if "--check" in sys.argv[1:]:
            print(f"{path.name}: not current; run scripts/readme.py")
        else:
            path.write_text(made[path])
    return 1 if stale and "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
