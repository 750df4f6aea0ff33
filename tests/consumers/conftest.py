"""What the tests of clients share: the marker that names the columns of docs/clients.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--reports", type=Path, help="a file to which each test adds a line")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "shows(*columns): the columns of docs/clients.md that a test speaks for"
    )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """One line per test: its name, columns, outcome (passed, failed, skipped, refused), reason."""
    report = (yield).get_result()
    path = item.config.getoption("--reports", None)
    ended = report.when == "call" or (report.when == "setup" and not report.passed)
    if path is None or not ended:
        return
    columns = [column for mark in item.iter_markers("shows") for column in mark.args]
    outcome, reason = report.outcome, ""
    if hasattr(report, "wasxfail"):
        outcome, reason = "refused", report.wasxfail
    elif report.skipped:
        reason = report.longrepr[2].replace("Skipped: ", "")
    elif report.failed:
        lines = str(call.excinfo.value).strip().splitlines() or [""]
        reason = f"{call.excinfo.typename}: {lines[0]}"[:300]
    line = {"name": item.name, "shows": columns, "outcome": outcome, "reason": reason}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
