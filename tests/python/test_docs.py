"""What the pages say exists, and their generated tables are current."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from tree import REPOSITORY, tracked

from anyflash.__main__ import _parser

PAGES = [path.relative_to(REPOSITORY).as_posix() for path in tracked("*.md", "docs/**/*.md")]


def read(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def test_tables_are_current():
    command = [sys.executable, "scripts/dispatch_table.py", "--check"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    text = read(page)
    makefile = read("Makefile")
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    commands = next(a.choices for a in _parser()._actions if a.dest == "command")
    for command in re.findall(r"python -m anyflash (\w+)", text):
        assert command in commands, command
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert (REPOSITORY / f"{module.replace('.', '/')}.py").is_file(), module


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    folders = "csrc|kernels|python|emulator|tests|scripts|docs|benchmarks|examples|tools"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", read(page)):
        if "results" not in path:
            assert (REPOSITORY / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_environment_variables_are_known(page):
    from anyflash._doctor import ENVIRONMENT

    for name in re.findall(r"ANYFLASH_[A-Z_]+", read(page)):
        assert name in ENVIRONMENT, name


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", read(page)):
            assert (REPOSITORY / page).parent.joinpath(link).exists(), f"{page}: {link}"


def test_the_code_of_the_readme_runs_as_pasted(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", read("README.md"), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "forward" in capsys.readouterr().out


def test_explain_examples_run():
    from anyflash.__main__ import main

    for page in ("README.md", "docs/dispatch.md", "CONTRIBUTING.md"):
        for line in re.findall(r"python -m anyflash explain ([^`\n]+)", read(page)):
            if line[0].islower() and len(line.split()) > 2 and "answers" not in line:
                assert main(["explain", *line.rstrip(".").split()]) in (0, 1), line


def test_benchmark_page_is_made_of_rows():
    from benchmarks.run import markdown

    row = dict(name="a", ours=1.0, reference=None, ratio=None, goal="<= 2 s", met=False)
    assert markdown([row]).splitlines()[-1] == "| a | 1 |  |  | <= 2 s | **no** |"
    json.dumps(row)
