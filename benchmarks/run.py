"""`make bench`: every figure beside its reference, on screen and in out/bench.json.

python -m benchmarks.run [--only attention,overhead] [--out out/bench.json]
python -m benchmarks.run --only ... --docs     # measures nothing: out/bench.json into the table
                                               # under this command in docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import platform
import sys
import traceback

TOPICS = (
    "attention",
    "sdpa",
    "models",
    "memory",
    "rotary",
    "norm",
    "cross_entropy",
    "mlp",
    "overhead",
    "distributed",
    "startup",
    "install",
)
CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
PAGE = CHECKOUT / "docs/benchmarks.md"
BEGIN = "<!-- table: python -m benchmarks.run --only {} --docs -->"  # topics
END = "<!-- end of table -->"


def measure(topics: list[str], out: pathlib.Path) -> int:
    """Runs the topics, shows each row as it comes, writes them; 1 if a topic broke off."""
    from benchmarks.measure import Row, table

    rows: list[Row] = []
    failed: list[str] = []
    for topic in topics:
        print(f"{topic} ...", file=sys.stderr, flush=True)
        try:
            for row in importlib.import_module(f"benchmarks.bench_{topic}").rows():
                print(f"  {row.name}: {row.ours:.4g}", file=sys.stderr, flush=True)
                rows.append(row)
        except Exception:  # noqa: BLE001 - the other topics still count
            traceback.print_exc()
            failed.append(topic)
    print(table(rows))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([row.as_dict() for row in rows], indent=2) + "\n")
    print(f"\n{sum(row.met for row in rows)} of {len(rows)} goals met; {out}; {machine()}")
    if failed:
        print(f"broken off: {', '.join(failed)}")
    return 1 if failed else 0


def processor() -> str:
    """Its name, where the system tells one."""
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return model


def machine() -> str:
    """Processor, threads and torch in one line."""
    import torch

    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def markdown(rows: list[dict[str, object]]) -> str:
    """The rows as the table of docs/benchmarks.md."""
    lines = ["| what | ours | reference | ratio | goal | met |", "|---|---|---|---|---|---|"]
    for row in rows:
        reference = "" if row["reference"] is None else f"{row['reference']:.4g}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        met = "yes" if row["met"] else "**no**"
        lines.append(
            f"| {row['name']} | {row['ours']:.4g} | {reference} | {ratio} | {row['goal']} | {met} |"
        )
    return "\n".join(lines)


def write_page(begin: str, text: str) -> int:
    """Puts the text between the line `begin` of docs/benchmarks.md and the end of its table; 1 if
    there is no such line."""
    head, found, rest = PAGE.read_text().partition(begin)
    if not found:
        print(f"{PAGE.name}: no line {begin}", file=sys.stderr)
        return 1
    _, _, tail = rest.partition(END)
    PAGE.write_text(f"{head}{begin}\n{text}\n{END}{tail}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default=",".join(TOPICS), help=f"topics out of {', '.join(TOPICS)}"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bench.json"))
    parser.add_argument("--docs", action="store_true", help="write docs/benchmarks.md and stop")
    options = parser.parse_args()
    topics = options.only.split(",")
    if unknown := sorted(set(topics) - set(TOPICS)):
        parser.error(f"unknown topic {', '.join(unknown)}; known: {', '.join(TOPICS)}")
    if options.docs:
        rows = markdown(json.loads(options.out.read_text()))
        return write_page(BEGIN.format(options.only), f"{machine()}\n\n{rows}")
    return measure(topics, options.out)


if __name__ == "__main__":
    sys.exit(main())
