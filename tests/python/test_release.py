"""What a machine can check of RELEASING.md: scripts/release.py, on this tree and on others."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from tree import REPOSITORY, text_of, tracked

import anyflash

sys.path.append(str(REPOSITORY / "scripts"))
from release import headings, is_dated, missing, urls, version_of  # noqa: E402


def test_the_version_stands_in_one_place():
    assert version_of(REPOSITORY) == anyflash.__version__
    quoted = f'"{anyflash.__version__}"'
    holders = [path.name for path in tracked("**") if quoted in (text_of(path) or "")]
    assert holders == ["_version.py"]


def test_the_changelog_is_of_dated_releases_newest_first():
    newest, *others = headings(REPOSITORY)
    assert newest == "Unreleased" or is_dated(newest, re.escape(anyflash.__version__))
    assert all(map(is_dated, others))
    dates = [heading.split("(")[1] for heading in (newest, *others) if is_dated(heading)]
    assert dates == sorted(dates, reverse=True)


def test_no_address_is_invented():
    """Either all of them are known, or none is written."""
    known = urls(REPOSITORY)
    assert not known or not [text for text in missing(REPOSITORY, []) if ".urls" in text]


ADDRESS = "https://example.org/anyflash"
READY = {
    "python/anyflash/_version.py": '__version__ = "1.2.3"\n',
    "CHANGELOG.md": "# Changelog\n\n## 1.2.3 (2027-01-31)\n\n## 1.2.2 (2026-12-31)\n",
    "README.md": f"```\ngit clone {ADDRESS} anyflash\n```\n",
    "pyproject.toml": '[project]\nname = "anyflash"\n\n[project.urls]\n'
    + "".join(
        f'{name} = "{ADDRESS}"\n' for name in ("Repository", "Documentation", "Changelog", "Issues")
    )
    + "\n[tool.ruff]\nselect = []\n",
}
FAULTS = [
    ("python/anyflash/_version.py", "1.2.3", "1.2.3.dev0", "_version.py: expected a release"),
    ("CHANGELOG.md", "1.2.3 (2027-01-31)", "Unreleased", "got '## Unreleased'"),
    ("CHANGELOG.md", "1.2.3 (2027-01-31)", "1.2.3", "got '## 1.2.3'"),
    ("CHANGELOG.md", "1.2.3 (2027-01-31)", "1.2.4 (2027-01-31)", "expected '## 1.2.3 (year"),
    ("README.md", ADDRESS, "ADDRESS-OF-THIS-REPOSITORY", f"expected 'git clone {ADDRESS}"),
    ("pyproject.toml", "Issues", "Tracker", "[project.urls] with Issues"),
    ("pyproject.toml", "[project.urls]", "[other]", "with Repository, Documentation, Changelog"),
]


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_tree_that_is_ready(tmp_path):
    assert not list(missing(written(tmp_path, READY), ["v1.2.2"]))


def test_a_tag_that_is_taken(tmp_path):
    assert list(missing(written(tmp_path, READY), ["v1.2.3"])) == [
        "git: there is a tag v1.2.3 already"
    ]


@pytest.mark.parametrize("name, old, new, said", FAULTS)
def test_a_fault_is_told(tmp_path, name, old, new, said):
    faulty = {**READY, name: READY[name].replace(old, new)}
    assert said in next(missing(written(tmp_path, faulty), []))
