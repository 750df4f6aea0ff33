"""Cross entropy beside PyTorch's: 2048 rows of 32000 classes, forward and backward, 2 threads."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from benchmarks.measure import Row, interleaved
from torch import Tensor

import anyflash

ROWS, VOCAB = 2048, 32000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Loss = Callable[[Tensor, Tensor], Tensor]


def _inputs(dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    logits = torch.randn(rows, VOCAB).to(dtype).requires_grad_()
    return logits, torch.randint(VOCAB, (rows,))


def _ours(logits: Tensor, labels: Tensor) -> Tensor:
    return anyflash.cross_entropy(logits, labels)[0].mean()


def _in_place(logits: Tensor, labels: Tensor) -> Tensor:
    return anyflash.cross_entropy(logits.view_as(logits), labels, inplace_backward=True)[0].mean()


LOSSES: dict[str, Loss] = {"ours": _ours, "in_place": _in_place, "torch": F.cross_entropy}


def rows() -> Iterator[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for name, dtype in DTYPES.items():
            yield from _speed(name, dtype)
    finally:
        torch.set_num_threads(threads)
    if pathlib.Path("/proc/self/clear_refs").exists():
        for name in DTYPES:
            yield _memory(name)


def _speed(name: str, dtype: torch.dtype) -> Iterator[Row]:
    logits, labels = _inputs(dtype)
    ours, reference = interleaved(
        lambda: torch.autograd.grad(_ours(logits, labels), logits),
        lambda: torch.autograd.grad(F.cross_entropy(logits, labels), logits),
    )
    yield Row.speed(
        f"cross_entropy {ROWS} x {VOCAB} {name}, forward+backward (ms)",
        1e3 * ours,
        1e3 * reference,
        at_least=1.5,
    )


def _memory(name: str) -> Row:
    """Each in a process of its own, whose peak is its own too."""
    ours, reference = (
        float(
            subprocess.run(
                [sys.executable, "-m", "benchmarks.bench_cross_entropy", loss, name],
                check=True,
                capture_output=True,
                text=True,
                cwd=pathlib.Path(__file__).parent.parent,
            ).stdout
        )
        for loss in ("in_place", "torch")
    )
    return Row.speed(
        f"cross_entropy {ROWS} x {VOCAB} {name} in place, peak above the logits (MiB)",
        ours,
        reference,
        at_least=2,
    )


def _status(key: str) -> float:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def _peak(loss: Loss, dtype: torch.dtype) -> float:
    """MiB that forward and backward take above what is there before; 1 at the least, since the
    kernel counts in batches."""

    def measured(rows: int) -> float:
        logits, labels = _inputs(dtype, rows)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before = _status("VmRSS")
        torch.autograd.grad(loss(logits, labels), logits)
        return max(1.0, _status("VmHWM") - before)

    measured(8)
    return measured(ROWS)


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(_peak(LOSSES[sys.argv[1]], DTYPES[sys.argv[2]]))
