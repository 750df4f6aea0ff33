"""What pyproject.toml cannot say: the version that the user names, and every module of the drop-in.

Environment:
    ANYFLASH_COMPANION_VERSION  this package's version, such as 2.7.4.post1; unset: the drop-in's
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py

DROPIN = pathlib.Path(__file__).resolve().parents[2] / "python/anyflash/dropin"
_VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)

provided = _VERSION.search((DROPIN / "flash_attn/__init__.py").read_text()).group(1)
version = os.environ.get("ANYFLASH_COMPANION_VERSION", "").strip() or provided


class BuildPy(build_py):
    """Gives the copied package the version, which clients compare with the metadata's, and the mark
    by which anyflash knows it."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)  # nothing of a former build comes in
        super().run()
        package = pathlib.Path(self.build_lib) / "flash_attn"
        init = package / "__init__.py"
        init.write_text(_VERSION.sub(f'__version__ = "{version}"', init.read_text()))
        mark = '"""This copy of flash_attn is that of anyflash\'s flash-attn wheel."""\n'
        (package / "_companion.py").write_text(mark)


setup(
    version=version,
    py_modules=sorted(path.stem for path in DROPIN.glob("*.py")),
    cmdclass={"build_py": BuildPy},
)
