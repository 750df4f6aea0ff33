"""One process of benchmarks.peers: one engine beside anyflash and PyTorch's attention.

python -m benchmarks.peers_measure ENGINE --threads N [--peak LIBRARY] [--dtypes ...] [--small]

Writes a JSON object a line: first the versions, then one for every cell, or for every dtype that
the engine refuses.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
from collections.abc import Iterator
from typing import Any, Callable

import torch
from benchmarks.measure import interleaved
from benchmarks.peers_engines import ENGINES, Call, Engine, Sdpa
from benchmarks.peers_table import Cell
from torch import Tensor

import anyflash

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The largest relative error of a row of the output, between two engines. In bf16 some round the
# scores, too.
TOLERANCES = {"fp32": 1e-4, "bf16": 0.05, "fp16": 5e-3}

HEAD_DIMS = (64, 96, 128, 256)
# batch, heads, seqlen: fewer heads for longer sequences, but one for each thread.
PREFILL = (
    (8, 12, 128), (4, 8, 256), (2, 8, 512), (1, 8, 1024), (1, 2, 2048), (1, 1, 4096), (1, 1, 8192),
)  # fmt: skip
DECODE_HEAD_DIM = 128
DECODE_HEADS = ((32, 32), (32, 8))
DECODE = ((1, 1024), (1, 32768), (4, 4096), (16, 1024))  # batch, keys

PAUSE = 3e-3  # seconds, for threads that spin after a call
SECONDS, ROUNDS = 0.25, 3  # for a cell at the least
MULTIPLY_ADDS = 1_000_000  # steps of peak.cpp: some milliseconds
READ = 1 << 27  # floats


def cells(dtype: str, threads: int, small: bool) -> Iterator[Cell]:
    """The grid; `small` has every second shape and head dim."""
    step = 2 if small else 1
    for head_dim in HEAD_DIMS[::step]:
        for causal in (False, True):
            for batch, fewest, seqlen in PREFILL[::step]:
                heads = max(fewest, threads)
                yield Cell(dtype, head_dim, causal, batch, heads, heads, seqlen, seqlen)
    for heads, heads_k in DECODE_HEADS:
        for batch, keys in DECODE[::step]:
            yield Cell(dtype, DECODE_HEAD_DIM, False, batch, heads, heads_k, 1, keys)


def inputs(cell: Cell) -> list[Tensor]:
    """q, k, v. Random numbers are slow to make, so that large tensors repeat a block of them; its
    odd length keeps rows apart."""
    block = torch.randn(1_000_003).to(DTYPES[cell.dtype])
    tensors = []
    for seqlen, heads in (
        (cell.queries, cell.heads), (cell.keys, cell.heads_k), (cell.keys, cell.heads_k),
    ):  # fmt: skip
        shape = (cell.batch, seqlen, heads, cell.head_dim)
        size = math.prod(shape)
        repeated = block.repeat(-(-size // block.numel()))[:size]
        tensors.append(repeated.view(shape).roll(len(tensors), -1))
    return tensors


def ours(cell: Cell, q: Tensor, k: Tensor, v: Tensor) -> Call:
    if cell.decode:
        return lambda: anyflash.attention_kvcache(q, k, v, backend="kernel")
    return lambda: anyflash.attention(q, k, v, causal=cell.causal, backend="kernel")


def theirs(engine: Engine, cell: Cell, q: Tensor, k: Tensor, v: Tensor) -> Call:
    return engine.decode(q, k, v) if cell.decode else engine.prefill(q, k, v, cell.causal)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row."""
    found, expected = found.float(), expected.float()
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


class Limits:
    """What the cores can multiply and add, what memory can be read."""

    def __init__(self, library: str | None, threads: int) -> None:
        self.threads = threads
        self.peak = ctypes.CDLL(library) if library else None
        self.memory = torch.ones(READ)

    def of(self, cell: Cell) -> tuple[Callable[[], Any], float] | None:
        """(a call, its work in the unit of cell.work); None where there is none to tell."""
        if cell.decode:
            return self.memory.sum, 4.0 * self.memory.numel()
        if self.peak is None:
            return None
        multiply_add = self.peak.peak_bf16 if cell.dtype == "bf16" else self.peak.peak_fp32
        multiply_add.restype = ctypes.c_double
        arguments = (ctypes.c_int(self.threads), ctypes.c_long(MULTIPLY_ADDS))
        work = multiply_add(*arguments)
        return (lambda: multiply_add(*arguments), work) if work else None


def measure(cell: Cell, engines: dict[str, Engine], limits: Limits) -> dict[str, Any]:
    """The cell with seconds by name, what the machine can do, and what went wrong."""
    q, k, v = inputs(cell)
    calls: dict[str, Call] = {"anyflash": ours(cell, q, k, v)}
    expected = calls["anyflash"]()
    result: dict[str, Any] = {"cell": cell._asdict(), "differences": {}, "failed": {}}
    for name, engine in engines.items():
        try:
            call = theirs(engine, cell, q, k, v)
            error = difference(call(), expected)
        except Exception as reason:  # noqa: BLE001 - whatever an engine raises is its result here
            result["failed"][name] = f"{type(reason).__name__}: {first_line(reason)}"
            continue
        result["differences"][name] = error
        if error <= TOLERANCES[cell.dtype]:
            calls[name] = call
        else:
            result["failed"][name] = f"differs from ours by {error:.1e}"
    limit = limits.of(cell)
    measured = [*calls.values(), *([limit[0]] if limit else [])]
    times = interleaved(*measured, seconds=SECONDS, least=ROUNDS, pause=PAUSE, warm=True)
    result["seconds"] = dict(zip(calls, times))
    result["limit"] = limit[1] / times[-1] if limit else None
    return result


def refusal(engine: Engine, dtype: str) -> str | None:
    """Why the engine does not compute in the dtype, by a small problem."""
    cell = Cell(dtype, 64, False, 1, 2, 2, 64, 64)
    try:
        theirs(engine, cell, *inputs(cell))()
    except Exception as reason:  # noqa: BLE001 - whatever an engine raises
        return first_line(reason)
    return None


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--peak", help="peak.cpp, compiled")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--small", action="store_true", help="a part of the grid")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    def write(record: dict[str, Any]) -> None:
        print(json.dumps(record), flush=True)

    engines: dict[str, Engine] = {"sdpa": Sdpa(options.threads)}
    if options.engine not in engines:
        engines[options.engine] = ENGINES[options.engine](options.threads)
    write({"versions": [engine.version() for engine in engines.values()]})
    limits = Limits(options.peak, options.threads)
    with torch.inference_mode():
        for dtype in options.dtypes:
            if reason := refusal(engines[options.engine], dtype):
                write({"dtype": dtype, "refused": reason})
                continue
            for cell in cells(dtype, options.threads, options.small):
                write(measure(cell, engines, limits))


if __name__ == "__main__":
    main()
