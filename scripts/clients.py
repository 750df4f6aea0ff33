"""Runs the packages that use flash_attn, unmodified: `make test-consumers` -> docs/clients.md.

tests/consumers/manifest.py says which, in which versions, and with which program. Every
environment is a throwaway venv that adds its packages to those of .venv (so torch and anyflash are
those of .venv); every program is a file of pytest tests that runs in a process of its own, on the
CPU. A test says with `pytest.mark.shows` which columns of the table it speaks for.

usage: clients.py [--only WORD ...] [--prepare]   (with --only the table stays as it is)
exit status 1 when a cell failed
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from test_matrix import REPOSITORY, must, run

CONSUMERS = REPOSITORY / "tests" / "consumers"
FOLDER = REPOSITORY / "out" / "clients"
TABLE = REPOSITORY / "docs" / "clients.md"
COLUMNS = ("found", "imported", "forward", "backward", "compiled")

HEADING = """# Clients of flash_attn

Written by `make test-consumers`, on a CPU. Where the version is that of a package, the published
package itself computes through `flash_attn`, unmodified (its device checks are told
that there is a GPU), and is compared with its own eager or SDPA path; "calls of" are programs of
ours that make the calls of a repository. A number says how many checks passed; `no`: skipped or
refused, with the reason below; an empty cell: not applicable, or not checked. Rows of
`accelerate_sdpa` use PyTorch's attention instead, with and without
`anyflash.accelerate_sdpa()`, in fp32 and bf16; checks of it are among those of
sentence-transformers and diffusers too.

transformers asks for a GPU before it calls `flash_attn`. Without one:

    from anyflash.integrations import transformers as integration

    integration.enable()                        # attn_implementation=integration.NAME
    integration.enable(flash_attention_2=True)  # that name as well; before models are imported

xformers prefers an installed `flash_attn` to PyTorch's own copy: with anyflash beside it, its
attention on a GPU runs on anyflash.
"""

sys.path.insert(0, str(CONSUMERS))
from manifest import CLIENTS, ENVIRONMENTS, Client, Environment  # noqa: E402


class Cell(NamedTuple):
    """What the tests that speak for one column of one client said."""

    passed: int
    failed: list[str]
    others: list[str]  # skipped, or refused as the manifest's programs expect

    def __str__(self) -> str:
        if self.failed:
            total = self.passed + len(self.failed)
            return f"**{len(self.failed)} of {total} failed**"
        if self.passed:
            return f"ok ({self.passed})" + (f", no ({len(self.others)})" if self.others else "")
        return "no" if self.others else ""


class Row(NamedTuple):
    client: Client
    version: str
    cells: dict[str, Cell]
    remarks: list[str]
    seconds: float

    @property
    def failed(self) -> bool:
        return any(cell.failed for cell in self.cells.values())


def interpreter(name: str, environment: Environment) -> Path:
    """The Python of an environment, made when it is missing or its packages changed."""
    if environment == Environment():
        return Path(sys.executable)
    folder = FOLDER / name
    made = folder / "made"
    if not made.exists() or made.read_text() != repr(environment):
        shutil.rmtree(folder, ignore_errors=True)
        must(sys.executable, "-m", "venv", "--without-pip", folder)
        base, purelib = sysconfig.get_path("purelib"), f"python{sys.version[:4]}/site-packages"
        line = f"import site; site.addsitedir({base!r})\n"
        (folder / "lib" / purelib / "_base.pth").write_text(line)
        install = (sys.executable, "-m", "pip", "--disable-pip-version-check")
        install += ("--python", folder / "bin/python", "install", "-q")
        if environment.packages:
            must(*install, *environment.packages)
        if environment.alone:
            must(*install, "--no-deps", *environment.alone)
        made.write_text(repr(environment))
    return folder / "bin/python"


def prepare(names: Iterable[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Interpreters of the environments, and why those are missing that could not be made."""
    ready, missing = {}, {}
    for name in dict.fromkeys(names):
        try:
            ready[name] = interpreter(name, ENVIRONMENTS[name])
        except SystemExit as error:
            missing[name] = str(error).strip().splitlines()[-1]
            print(error, file=sys.stderr)
    return ready, missing


def version_of(client: Client, python: Path) -> str:
    if client.version != "installed":
        return client.version
    package = client.name.partition(",")[0]
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return must(python, "-c", code).strip()


def results(client: Client, python: Path) -> tuple[list[dict], str]:
    """The reports of a client's tests; and what the process said when it ended badly."""
    reports = FOLDER / "reports.jsonl"
    reports.unlink(missing_ok=True)
    command = (python, "-m", "pytest", CONSUMERS / client.program, "-p", "no:cacheprovider")
    try:
        done = run(*command, "--reports", reports, limit=client.seconds, OMP_NUM_THREADS="1")
        said = done.stdout[-1500:] + done.stderr[-1500:] if done.returncode > 1 else ""
    except subprocess.TimeoutExpired:
        said = f"stopped after {client.seconds} s"
    lines = reports.read_text().splitlines() if reports.exists() else []
    return [json.loads(line) for line in lines], said.strip()


def remarks_on(tests: list[dict]) -> list[str]:
    """Why tests did not pass; those with one reason together."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for test in tests:
        if test["outcome"] != "passed":
            reasons.setdefault((test["outcome"], test["reason"]), []).append(test["name"])
    return [
        f"{outcome}: {reason} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
        for (outcome, reason), names in reasons.items()
    ]


def row(client: Client, python: Path) -> Row:
    start = time.perf_counter()
    tests, said = results(client, python)
    cells = {column: Cell(0, [], []) for column in COLUMNS}
    for test in tests:
        for column in test["shows"]:
            cell = cells[column]
            if test["outcome"] == "passed":
                cells[column] = cell._replace(passed=cell.passed + 1)
            else:
                kind = cell.failed if test["outcome"] == "failed" else cell.others
                kind.append(test["name"])
    remarks = remarks_on(tests)
    if said or not tests:
        errors = [line[1:].strip() for line in said.splitlines() if line.startswith("E  ")]
        reason = [*said.splitlines()[-1:], *errors][-1] if said else "no test ran"
        cells["imported"].failed.append("process")
        remarks.append(f"the process ended: {reason}")
        print(said, file=sys.stderr)
    return Row(client, version_of(client, python), cells, remarks, time.perf_counter() - start)


def rows(only: list[str]) -> Iterator[Row]:
    chosen = [c for c in CLIENTS if not only or any(w in f"{c.name} {c.environment}" for w in only)]
    ready, missing = prepare(c.environment for c in chosen)
    for client in chosen:
        if client.environment in missing:
            why = f"not run: could not be installed: {missing[client.environment]}"
            yield Row(client, client.version, {c: Cell(0, [], []) for c in COLUMNS}, [why], 0.0)
            continue
        found = row(client, ready[client.environment])
        cells = ", ".join(f"{name} {cell}" for name, cell in found.cells.items() if str(cell))
        print(f"{client.name} {found.version}: {cells} ({found.seconds:.0f} s)", flush=True)
        for remark in found.remarks:
            print(f"  {remark}", flush=True)
        yield found


def table(found: list[Row]) -> str:
    import torch

    head = ("client", "version", *COLUMNS)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}."
    lines = [HEADING, versions, "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for r in found:
        cells = (str(r.cells[column]) for column in COLUMNS)
        lines.append(f"| {r.client.name} | {r.version} | " + " | ".join(cells) + " |")
    remarks = [f"- {r.client.name} {r.version}: {text}" for r in found for text in r.remarks]
    if remarks:
        lines += ["", "## Failed, skipped or refused", "", *remarks]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="the clients of flash_attn")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="WORD", help="leaves the table alone"
    )
    parser.add_argument("--prepare", action="store_true", help="only makes the environments")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if options.prepare:
        return int(bool(prepare(ENVIRONMENTS)[1]))
    found = list(rows(options.only))
    if found and not options.only:
        TABLE.write_text(table(found))
    return int(not found or any(r.failed for r in found))


if __name__ == "__main__":
    sys.exit(main())
