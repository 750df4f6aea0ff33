"""Sphinx for `make docs`: the guides as they lie in the tree, and the docstrings.

The source folder is the repository's root, so that the pages' links to each other hold.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

import anyflash

project = "anyflash"
author = "the anyflash authors"
version = release = anyflash.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "examples/*/README.md"]
exclude_patterns = [".*", "build", "out", "python", "tests"]

myst_heading_anchors = 4  # links to headings, as forges make them
autodoc_inherit_docstrings = False  # those of torch have references of their own
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
napoleon_numpy_docstring = False

html_theme = "alabaster"
html_theme_options = {"page_width": "1100px"}
html_extra_path = ["html"]  # the way from the top to docs/index.html
html_show_copyright = False


def dropin_modules() -> Iterator[str]:
    """Every module that `import flash_attn` and the extension names offer, refused ones too."""
    folder = Path(anyflash.__file__).parent / "dropin"
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if not any(part.startswith("_") and part != "__init__" for part in parts):
            yield ".".join(part for part in parts if part != "__init__")


def section(module: str) -> str:
    """A module's part of the page: what it holds, or why it is refused."""
    try:
        importlib.import_module(module)
        text = f".. automodule:: {module}\n   :members:"
    except ModuleNotFoundError as refusal:
        text = f"``{refusal}``"
    return f"\n{module}\n{'-' * len(module)}\n\n{text}\n"


def add_dropin_modules(app: Sphinx, docname: str, content: list[str]) -> None:
    if docname == "docs/reference_flash_attn":
        content[0] += "".join(map(section, dropin_modules()))


def show_every_keyword(module: str) -> None:
    """Of an overloaded function the signature that runs: the others, for mypy, name no defaults."""
    analyzer = ModuleAnalyzer.for_module(module)
    analyzer.analyze()
    analyzer.overloads.clear()


def setup(app: Sphinx) -> None:
    show_every_keyword("anyflash.attention")
    app.connect("source-read", add_dropin_modules)
