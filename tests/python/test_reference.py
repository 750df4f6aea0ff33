"""The pages of `make docs`: built without a warning, every public name on them, no dead link."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from tree import REPOSITORY, text_of, tracked

import anyflash

for tool in ("sphinx", "myst_parser"):
    pytest.importorskip(tool, reason="needs Python 3.11")
sys.path.append(str(REPOSITORY / "docs"))
from conf import dropin_modules  # noqa: E402

OUR_PAGE = "reference"
OURS = (
    *("anyflash", "anyflash.backends", "anyflash.testing"),
    *("anyflash.integrations.onnx", "anyflash.integrations.transformers"),
    "anyflash.integrations.torch_flash",
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """All of it, by the command of the Makefile."""
    out = tmp_path_factory.mktemp("docs")
    (line,) = re.findall(
        r"^\t\$\(BIN\)/python (-m sphinx .*) out/docs$",
        (REPOSITORY / "Makefile").read_text(),
        re.MULTILINE,
    )
    done = subprocess.run(
        [sys.executable, *line.split(), out], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out


def public(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Functions and classes: those of ``__all__``, or those that the module defines."""
    for name, value in vars(module).items():
        if inspect.isfunction(value) or inspect.isclass(value):
            ours = value.__module__ == module.__name__ and not name.startswith("_")
            if name in getattr(module, "__all__", ()) or (ours and not hasattr(module, "__all__")):
                yield f"{module.__name__}.{name}", value


def imported(names: Iterable[str]) -> Iterator[ModuleType]:
    for name in names:
        try:
            yield importlib.import_module(name)
        except ModuleNotFoundError:  # refused, which the page says
            continue


@pytest.mark.parametrize(
    "page, modules",
    [(OUR_PAGE, OURS), ("reference_flash_attn", tuple(dropin_modules()))],
    ids=["anyflash", "flash_attn"],
)
def test_every_public_function_is_there(pages, page, modules):
    text = text_of(pages / f"docs/{page}.html")
    found: dict[object, bool] = {}  # under one of its names
    for module in imported(modules):
        for name, value in public(module):
            found[value] = found.get(value, False) or f'id="{name}"' in text
    assert len(found) > 20 and not [value for value, there in found.items() if not there]
    assert not [name for name in modules if f"<h2>{name}<" not in text]


def test_every_parameter_is_in_the_signature(pages):
    text = text_of(pages / f"docs/{OUR_PAGE}.html")
    for name in anyflash.__all__:
        function = getattr(anyflash, name)
        if inspect.isfunction(function):
            (shown,) = re.findall(rf'id="anyflash\.{name}">(.*?)</dt>', text, re.DOTALL)
            words = re.findall(r'<span class="n"><span class="pre">(\w+)', shown)
            assert set(inspect.signature(function).parameters) <= set(words), name


def test_every_guide_is_there(pages):
    """Sphinx says itself, as a warning, which of them no table of contents has."""
    guides = [path for path in tracked("*.md", "docs/**/*.md", "examples/*/README.md")]
    names = [path.relative_to(REPOSITORY).with_suffix(".html") for path in guides]
    assert not [name for name in names if not (pages / name).is_file()]


def test_no_link_is_dead(pages):
    dead = [
        f"{page.relative_to(pages)}: {link}"
        for page in pages.rglob("*.html")
        for link in re.findall(r'(?:href|src)="([^"#?]+)[^"]*"', text_of(page))
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert not dead, "\n".join(dead)
