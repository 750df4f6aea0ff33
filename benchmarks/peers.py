"""`make bench-peers`: the CPU attention beside the engines that people pick instead of it.

python -m benchmarks.peers             # measures; out/peers.json, the page and its picture
python -m benchmarks.peers --small     # a part of the grid, on the screen only
python -m benchmarks.peers --redraw    # the page and the picture from out/peers.json

One process for each engine and number of threads; in it the engine, PyTorch's attention and
anyflash run in turn. A run that was broken off goes on behind the last process that ended.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import zlib
from typing import Any

from benchmarks.peers_engines import ENGINES
from benchmarks.peers_measure import DTYPES
from benchmarks.peers_table import Cell, Result, combine, count, draw, markdown
from benchmarks.run import CHECKOUT, processor, write_page

from anyflash import _loader

PINS = CHECKOUT / "benchmarks/peers.txt"
FOLDER = CHECKOUT / "out/peers"
PYTHON = FOLDER / "env/bin/python"
PARTS = FOLDER / "parts"
RESULTS = CHECKOUT / "out/peers.json"
PICTURE = CHECKOUT / "docs/peers.svg"
BEGIN = "<!-- table: make bench-peers -->"

COMMON = ("torch", "numpy", "einops", "packaging")  # for anyflash and all engines
LIMIT = 1200  # seconds of a process
WEAKEST = 12  # cells that the page names


def install(*packages: str) -> str | None:
    """Into the environment, as pinned; what went wrong, or None."""
    uv = (sys.executable, "-m", "uv", "--quiet")
    if not PYTHON.exists():
        subprocess.run([*uv, "venv", "--python", sys.executable, PYTHON.parents[1]], check=True)
    command = [*uv, "pip", "install", "--python", PYTHON, "--constraints", PINS, *packages]
    done = subprocess.run(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    return done.stderr.strip() or "pip failed" if done.returncode else None


def compile_peak() -> list[str]:
    """The option that hands peak.cpp to a process; none without a compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return []
    library = FOLDER / "peak.so"
    source = CHECKOUT / "benchmarks/peak.cpp"
    flags = ["-O2", "-std=c++17", "-march=native", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    return ["--peak", str(library)]


def measure(engine: str, threads: int, options: list[str]) -> dict[str, Any]:
    """The rows of one process as they come, and what there is to say about it."""
    part: dict[str, Any] = {"rows": [], "remarks": [], "versions": []}
    command = [str(PYTHON), "-m", "benchmarks.peers_measure", engine, "--threads", str(threads)]
    ours = ("ANYFLASH_", "PYTHON", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {
        "PYTHONPATH": f"{CHECKOUT / 'python'}{os.pathsep}{CHECKOUT}",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",  # a thread that spins slows whoever comes next
        "KMP_BLOCKTIME": "0",
    }
    with subprocess.Popen(
        [*command, *options], cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        timer = threading.Timer(LIMIT, process.kill)
        timer.start()
        for line in process.stdout or ():
            record = json.loads(line)
            if "versions" in record:
                part |= record
            elif "refused" in record:
                part["remarks"].append(f"{engine}, {record['dtype']}: {record['refused']}")
                show(part["remarks"][-1])
            else:
                part["rows"].append({"threads": threads, **record})
                show_row(part["rows"][-1])
        timer.cancel()
    if process.returncode:
        after = f"after {Cell(**part['rows'][-1]['cell'])}" if part["rows"] else "at its start"
        part["remarks"].append(
            f"{engine}, {count(threads)}: broke off {after} with status {process.returncode}"
        )
        show(part["remarks"][-1])
    return part


def show(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show_row(row: dict[str, Any]) -> None:
    (result,) = combine([row])
    ratios = " ".join(f"{name} {ratio:.2f}" for name, ratio in result.ratios.items())
    share = "" if result.share is None else f", {result.share:.0%} of the limit"
    failed = "".join(f", {name}: {why}" for name, why in result.failed.items())
    show(f"  {result.cell}: {1e3 * row['seconds']['anyflash']:.2f} ms, {ratios}{share}{failed}")


def remembered(name: str, options: list[str], engine: str, threads: int) -> dict[str, Any]:
    """The part of a run that was broken off, if it measured the same; else measures it."""
    path = PARTS / f"{name}.json"
    files = (*PINS.parent.glob("peers*"), *CHECKOUT.glob("python/anyflash/*.so"))
    same = {"options": options} | {file.name: zlib.crc32(file.read_bytes()) for file in files}
    if path.exists() and (part := json.loads(path.read_text()))["same"] == same:
        show(f"{name}: measured before")
        return part
    show(f"{name} ...")
    part = {"same": same, **measure(engine, threads, options)}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(part))
    return part


def measure_all(small: bool) -> dict[str, Any]:
    """Every engine on one thread and on all."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if reason := install(*COMMON):
        raise SystemExit(reason)
    options = [*compile_peak(), *(["--small"] if small else [])]
    counts = sorted({1, len(os.sched_getaffinity(0))})
    remarks, parts = [], []
    for engine, kind in ENGINES.items():
        if engine == "sdpa":
            continue
        if reason := install(*kind.packages):
            remarks.append(f"{engine}: not installed: {reason.splitlines()[-1].strip()}")
            show(remarks[-1])
            continue
        for threads in counts:
            parts.append(remembered(f"{engine}-{threads}", options, engine, threads))
    for threads in counts:  # PyTorch's attention is in every process, but not every dtype
        seen = {r["cell"]["dtype"] for p in parts for r in p["rows"] if r["threads"] == threads}
        if left := sorted(set(DTYPES) - seen):
            rest = [*options, "--dtypes", *left]
            parts.append(remembered(f"sdpa-{threads}", rest, "sdpa", threads))
    remarks += [remark for part in parts for remark in part["remarks"]]
    return {
        "machine": f"{processor()} ({_loader.cpu_isa()}), {counts[-1]} cores",
        "versions": sorted({version for part in parts for version in part["versions"]}),
        "remarks": list(dict.fromkeys(remarks)),
        "small": small,
        "rows": [row for part in parts for row in part["rows"]],
    }


def text(run: dict[str, Any]) -> str:
    """What the page says: the machine, the versions, the table, what is missing."""
    results = combine(run["rows"])
    lines = [f"{run['machine']}; {', '.join(run['versions'])}", ""]
    if run["small"]:
        columns = list(dict.fromkeys(r.cell.column for r in results))
        head_dims = sorted({r.cell.head_dim for r in results})
        lines += [f"A part of the grid: head dims {head_dims}, {', '.join(columns)}.", ""]
    lines += [markdown(results, named(results), WEAKEST)]
    if run["remarks"]:
        lines += ["", "Not measured:", "", *(f"- {remark}" for remark in run["remarks"])]
    return "\n".join(lines)


def named(results: list[Result]) -> list[str]:
    """The engines that have something to show."""
    return [name for name in ENGINES if any(name in {**r.ratios, **r.failed} for r in results)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a part of the grid")
    parser.add_argument("--redraw", action="store_true", help="nothing is measured")
    options = parser.parse_args()
    if options.redraw:
        run = json.loads(RESULTS.read_text())
    else:
        run = measure_all(options.small)
        if not options.small:
            RESULTS.write_text(json.dumps(run) + "\n")
        shutil.rmtree(PARTS)
    print(text(run))
    if options.small:
        return 0
    results = combine(run["rows"])
    draw(results, named(results), PICTURE)
    return write_page(BEGIN, text(run))


if __name__ == "__main__":
    sys.exit(main())
