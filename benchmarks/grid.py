"""The CPU kernels beside the aten route over a grid of shapes.

python -m benchmarks.grid              # measures; out/ and docs/kernels/ get a grid_ISA each
python -m benchmarks.grid --table      # measures every instruction set; the MEASURED lines
python -m benchmarks.grid --table amx  # those of one instruction set alone

Both routes run the library's own operators on the same tensors, so that the ratio is what `auto`
gains or loses by its choice.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterator

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
PICTURES = CHECKOUT / "docs/kernels"
MEASURED = CHECKOUT / "core/measured.def"

DTYPES = ("fp32", "bf16", "fp16")
HEAD_DIMS = (32, 64, 128, 256)
# batch, heads, seqlen: fewer heads for longer sequences, so that a point takes a second at most.
SHAPES = (
    (1, 1, 1), (8, 16, 1), (4, 12, 4), (2, 8, 16), (1, 8, 32), (1, 12, 64), (8, 8, 128),
    (1, 12, 197), (2, 8, 256), (1, 2, 512), (2, 8, 512), (1, 8, 1024), (1, 4, 2048), (1, 2, 4096),
)  # fmt: skip
PACKED = ((7, 33, 1, 120, 64), (512, 17, 300, 1000), (2048, 1, 64), (128,) * 16)

KERNEL, ATEN = 1, 7  # digits of an order: core/problem.h

# Lower instruction sets, and how PyTorch and its libraries are held to them as well.
LOWER = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}


def points(small: bool) -> Iterator[dict[str, object]]:
    """The grid; `small` leaves out the longest sequences and half of the head dims."""
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS[1::2] if small else HEAD_DIMS:
            for causal in (False, True):
                base = {"dtype": dtype, "head_dim": head_dim, "causal": causal}
                for batch, heads, seqlen in SHAPES[:-2] if small else SHAPES:
                    yield base | {"batch": batch, "heads": heads, "lengths": (seqlen,)}
                for lengths in PACKED:
                    yield base | {"batch": 0, "heads": 4, "lengths": lengths}


def label(point: dict[str, object]) -> str:
    """The shape in a few letters."""
    lengths = point["lengths"]
    if point["batch"]:
        return f"b{point['batch']} h{point['heads']} s{lengths[0]}"
    if len(set(lengths)) == 1:
        return f"packed {len(lengths)} x {lengths[0]}"
    return "packed " + ",".join(map(str, lengths))


def measure(point: dict[str, object], seconds: float) -> dict[str, object]:
    """The point with ratios `forward` and `backward`: aten's time divided by the kernel's."""
    import torch
    from benchmarks.measure import interleaved

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[point["dtype"]]
    batch, heads, lengths, head_dim = (
        point[name] for name in ("batch", "heads", "lengths", "head_dim")
    )
    shape = (batch, lengths[0], heads, head_dim) if batch else (sum(lengths), heads, head_dim)
    q, k, v, dout = (torch.randn(shape).to(dtype) for _ in range(4))
    cu_seqlens = None
    if not batch:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    size = (cu_seqlens, cu_seqlens, max(lengths), max(lengths))
    mask = (1 / math.sqrt(head_dim), point["causal"], -1, -1, 0.0)
    ops = torch.ops.anyflash

    def forward(backend: int) -> tuple[torch.Tensor, ...]:
        last = (False, True, backend)
        return ops._flash_attn_forward(q, k, v, *size, *[None] * 7, 0.0, *mask, *last)

    out, lse, _ = forward(KERNEL)

    def backward(backend: int) -> object:
        given = (dout, q, k, v, out, lse, None)
        asked = (False, False, False)
        return ops._flash_attn_backward(*given, *size, *[None] * 6, 0.0, *mask, *asked, backend)

    result = dict(point)
    for name, run in (("forward", forward), ("backward", backward)):
        pair = [functools.partial(run, backend) for backend in (KERNEL, ATEN)]
        once = min(interleaved(*pair, seconds=0, least=1))
        number = max(1, int(1e-3 / once))
        ours, aten = interleaved(*pair, seconds=seconds, least=5, number=number)
        result[name] = aten / ours
    return result


def measure_all(small: bool, seconds: float) -> list[dict[str, object]]:
    """Every point of the grid, shown as it comes."""
    import torch

    import anyflash  # noqa: F401 - registers the operators

    torch.manual_seed(0)
    results = []
    for point in points(small):
        result = measure(point, seconds)
        results.append(result)
        mask = "causal" if point["causal"] else "full"
        print(
            f"{point['dtype']} d{point['head_dim']} {mask:6s} {label(point):28s} "
            f"forward {result['forward']:.2f} backward {result['backward']:.2f}",
            file=sys.stderr,
            flush=True,
        )
    return results


def draw(results: list[dict[str, object]], picture: pathlib.Path) -> None:
    """One row per dtype, head dim and mask, one column per shape, the ratio in the cell."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "anyflash", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    columns = list(dict.fromkeys(map(label, results)))
    keys = [(r["dtype"], r["head_dim"], r["causal"]) for r in results]
    rows = list(dict.fromkeys(keys))
    figure, axes = plt.subplots(2, 1, figsize=(13, 15), constrained_layout=True)
    for axis, direction in zip(axes, ("forward", "backward")):
        table = [[math.nan] * len(columns) for _ in rows]
        for key, result in zip(keys, results):
            ratio = result[direction]
            table[rows.index(key)][columns.index(label(result))] = math.log2(ratio)
            axis.text(
                columns.index(label(result)),
                rows.index(key),
                f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}",
                ha="center",
                va="center",
                fontsize=7,
            )
        axis.imshow(table, cmap="RdYlGn", vmin=-2, vmax=2, aspect="auto")
        axis.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=8)
        names = [f"{d} d{n} {'causal' if c else 'full'}" for d, n, c in rows]
        axis.set_yticks(range(len(rows)), names, fontsize=8)
        axis.set_title(f"{direction}: speed of the kernel / PyTorch's CPU attention (aten_cpu)")
    figure.savefig(picture, metadata={"Date": None})


def ratios(
    results: list[dict[str, object]], direction: str, dtype: str, head_dims: range
) -> list[float]:
    return [r[direction] for r in results if r["dtype"] == dtype and r["head_dim"] in head_dims]


def measure_lower(wanted: list[str], own: str) -> dict[str, list[dict[str, object]]]:
    """The smaller grid by instruction set below the machine's own, each in a process of its own."""
    from anyflash import backends

    results = {}
    for isa, limits in LOWER.items():
        lower = backends.ISAS.index(isa) < backends.ISAS.index(own)
        if isa not in wanted or not lower:
            continue
        print(f"{isa} ...", file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.grid", "--json"],
            cwd=CHECKOUT,
            env={**os.environ, **limits, "ANYFLASH_CPU_ISA": isa},
            stdout=subprocess.PIPE,
            check=True,
        )
        results[isa] = json.loads(done.stdout)
    return results


def write_table(by_isa: dict[str, list[dict[str, object]]]) -> None:
    """The ratios in the MEASURED lines of core/measured.def for CPUs; each line covers the head
    dims above those of the line before it."""
    from benchmarks.measure import measured_line

    lines = MEASURED.read_text().splitlines(keepends=True)
    above: dict[tuple[str, ...], int] = {}
    for index, line in enumerate(lines):
        if not line.startswith("MEASURED("):
            continue
        *key, head_dim, _, _ = (f.strip() for f in line[9:].rpartition(")")[0].split(","))
        arch, direction, dtype = key
        if arch.isdigit():  # a GPU
            continue
        head_dims = range(above.get(tuple(key), 0) + 1, int(head_dim) + 1)
        above[tuple(key)] = int(head_dim)
        if arch not in by_isa:
            continue
        found = ratios(by_isa[arch], direction, dtype, head_dims)
        lines[index] = measured_line(arch, direction, dtype, int(head_dim), found) + "\n"
    MEASURED.write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--table",
        nargs="*",
        choices=("amx", "avx512bf16", "avx512", "avx2"),
        help="write core/measured.def as well: the lines of these instruction sets, or of all",
    )
    parser.add_argument("--json", action="store_true", help="a smaller grid, as JSON, nothing else")
    parser.add_argument("--redraw", action="store_true", help="the picture from out/grid_ISA.json")
    options = parser.parse_args()
    if options.json:
        json.dump(measure_all(small=True, seconds=0.05), sys.stdout)
        return
    from anyflash import _loader

    isa = _loader.cpu_isa()
    kept = CHECKOUT / f"out/grid_{isa}.json"
    if options.redraw:
        results = json.loads(kept.read_text())
    else:
        results = measure_all(small=False, seconds=0.15)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(results) + "\n")
    draw(results, PICTURES / f"cpu_grid_{isa}.svg")
    for direction in ("forward", "backward"):
        for dtype in DTYPES:
            found = ratios(results, direction, dtype, range(1, 513))
            worst, median = min(found), statistics.median(found)
            print(f"{direction} {dtype}: worst {worst:.2f}x, median {median:.2f}x of aten_cpu")
    if options.table is not None:
        wanted = options.table or [isa, *LOWER]
        by_isa = {isa: results, **measure_lower(wanted, isa)}
        if isa in ("avx512bf16", "amx") and "avx512" in by_isa:
            # They have kernels of their own for bf16 alone.
            by_isa["avx512"] += [r for r in results if r["dtype"] != "bf16"]
        write_table({isa: found for isa, found in by_isa.items() if isa in wanted})


if __name__ == "__main__":
    main()
