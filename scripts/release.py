"""What a release must agree on before it is tagged (RELEASING.md): version, date, address, tag.

usage: release.py        prints what is missing; exit status 1 then
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
URLS = ("Repository", "Documentation", "Changelog", "Issues")


def read(root: Path, name: str) -> str:
    return (root / name).read_text(encoding="utf-8")


def version_of(root: Path) -> str:
    text = read(root, "python/anyflash/_version.py")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def headings(root: Path) -> list[str]:
    """Those of CHANGELOG.md, newest first."""
    return re.findall(r"^## (.+)$", read(root, "CHANGELOG.md"), re.MULTILINE)


def is_dated(heading: str, version: str = r"\d+\.\d+\.\d+\S*") -> bool:
    return bool(re.fullmatch(rf"{version} \(\d{{4}}-\d\d-\d\d\)", heading))


def urls(root: Path) -> dict[str, str]:
    """[project.urls] of pyproject.toml."""
    _, _, table = read(root, "pyproject.toml").partition("\n[project.urls]\n")
    return dict(re.findall(r'^(\w+) = "(.+)"$', table.partition("\n[")[0], re.MULTILINE))


def missing(root: Path, tags: list[str]) -> Iterator[str]:
    """What speaks against a release of this tree, in sentences."""
    version, newest, known = version_of(root), headings(root)[0], urls(root)
    if not re.fullmatch(r"\d+\.\d+\.\d+(rc\d+|\.post\d+)?", version):
        yield f"_version.py: expected a release such as 1.2.3, got {version}"
    if not is_dated(newest, re.escape(version)):
        yield f"CHANGELOG.md: expected '## {version} (year-month-day)' first, got '## {newest}'"
    if absent := [name for name in URLS if name not in known]:
        yield f"pyproject.toml: expected [project.urls] with {', '.join(absent)}"
    elif f"git clone {known['Repository']} anyflash" not in read(root, "README.md"):
        yield f"README.md: expected 'git clone {known['Repository']} anyflash'"
    if f"v{version}" in tags:
        yield f"git: there is a tag v{version} already"


def git(*command: str) -> str:
    return subprocess.run(
        ["git", "-C", str(REPOSITORY), *command], capture_output=True, text=True, check=True
    ).stdout


def main() -> int:
    found = list(missing(REPOSITORY, git("tag").split()))
    if git("status", "--porcelain"):
        found.append("git: there are files that are not committed")
    print("\n".join(found) or f"{version_of(REPOSITORY)} can be tagged")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
