"""What pages and comments name exists, links lead somewhere, and generated tables are current."""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from tree import REPOSITORY, text_of, tracked

from anyflash.__main__ import _parser
from anyflash._files import OPTIONS

TRACKED = {path.relative_to(REPOSITORY).as_posix() for path in tracked("**")}
FOLDERS = {folder.as_posix() for name in TRACKED for folder in Path(name).parents}
PAGES = sorted(name for name in TRACKED if name.endswith(".md"))
DOCUMENTS = {name.rpartition(".")[0] for name in TRACKED if name.endswith((".md", ".rst"))}


def read(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("script", ["dispatch_table.py", "readme.py"])
def test_tables_are_current(script):
    command = [sys.executable, f"scripts/{script}", "--check"]
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
    for option in re.findall(r"python -m anyflash (--[a-z-]+)", text):
        assert option in OPTIONS, option
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert (REPOSITORY / f"{module.replace('.', '/')}.py").is_file(), module


# Named like files of ours, but made by a build, by a GPU run, by a reader of the page.
MADE = {
    *("python/anyflash/_build.json", "python/anyflash/_lists.py", "python/anyflash/cmake"),
    *("python/anyflash/include", "benchmarks/results", "tests/cpp/fuzz_cpu_attention"),
    *("cmake/anyflashConfig.cmake.in", "built.def", "_lists.py", "_companion.py", "train.py"),
    *("kernel.cpp", "attend.cpp", "attend.py"),  # examples of a command
    "docs/index.html",
    "csrc/xentropy",  # upstream's
}
PATH = re.compile(
    rf"(?<![\w./-])((?:{'|'.join(sorted({name.split('/')[0] for name in TRACKED if '/' in name}))})"
    r"/[\w./-]*\w)"
)
FILE = re.compile(
    r"(?<![\w./<>*{}%-])(?!torch/)((?:[\w-]+/)*[A-Za-z_][\w-]*\.(?:h|cpp|cuh?|py|def|md|sh|cmake|svg))\b(?!\.\w)"
)
LINE_COMMENT = {
    **dict.fromkeys((".h", ".cpp", ".cu", ".cuh", ".def"), "//"),
    **dict.fromkeys((".cmake", ".sh", ".txt", ".toml", ".yaml"), "#"),
}


def comments(path: Path) -> str:
    """What a file says to its readers: all of a page, comments and docstrings of code."""
    text = text_of(path) or ""
    if path.suffix == ".md":
        return text
    if path.suffix == ".py":
        said = [t.string for t in tokenize.generate_tokens(io.StringIO(text).readline)
                if t.type == tokenize.COMMENT]  # fmt: skip
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
        return "\n".join([*said, *(ast.get_docstring(node) or "" for node in nodes)])
    mark = LINE_COMMENT.get(path.suffix, "#" if path.name == "Makefile" else None)
    return "\n".join(re.findall(rf"{mark}.*", text)) if mark else ""


def test_named_paths_exist():
    """Wherever a path of the tree is written, in code too, it leads to a file."""
    wrong = [
        f"{name}: {path}"
        for name in sorted(TRACKED)
        for path in PATH.findall(text_of(REPOSITORY / name) or "")
        if path not in TRACKED | FOLDERS | MADE | DOCUMENTS  # as Sphinx names pages
    ]
    assert not wrong, "\n".join(wrong)


def test_named_files_exist():
    """A comment that names a header means one file or more of that name, wherever they lie."""
    parts = [name.split("/") for name in TRACKED]
    known = MADE | {"/".join(path[i:]) for path in parts for i in range(len(path))}
    known |= {f"anyflash/{name}" for name in TRACKED}  # headers, installed
    wrong = [
        f"{path.relative_to(REPOSITORY)}: {name}"
        for path in tracked("**")
        for name in FILE.findall(comments(path))
        if name not in known
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES)
def test_environment_variables_are_known(page):
    from anyflash._doctor import ENVIRONMENT

    for name in re.findall(r"ANYFLASH_[A-Z_]+", read(page)):
        assert name in ENVIRONMENT, name


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", read(page)):
        target = (REPOSITORY / page).parent.joinpath(link).resolve() if link else REPOSITORY / page
        name = target.relative_to(REPOSITORY).as_posix()
        assert name in TRACKED | FOLDERS, f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}#{anchor}"


def python_of(page: str) -> list[str]:
    """The programs of a page that run in one process."""
    programs = re.findall(r"```python\n(.*?)```", read(page), re.DOTALL)
    return [code for code in programs if "WORLD_SIZE" not in code]


@pytest.mark.parametrize("number", range(len(python_of("README.md"))))
def test_the_code_of_the_readme_runs_as_pasted(number, capsys, tmp_path, monkeypatch):
    """Where it may leave files, with caches of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    code = python_of("README.md")[number]
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "print" not in code or "forward" in capsys.readouterr().out
    assert ".save(" not in code or list(tmp_path.glob("*.pt2"))


def test_the_code_about_onnx_runs_as_pasted(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    monkeypatch.chdir(tmp_path)
    (code,) = python_of("docs/graphs.md")
    exec(compile(code, "docs/graphs.md", "exec"), {"__name__": "page"})
    assert (tmp_path / "attention.onnx").stat().st_size > 0


def test_the_table_of_graphs_says_what_is_so():
    """For a few functions; the whole takes minutes."""
    command = [sys.executable, "scripts/graphs.py", "--quick"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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
