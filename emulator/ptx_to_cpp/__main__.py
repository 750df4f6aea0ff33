"""python -m ptx_to_cpp kernel.ptx kernel.cpp"""

from __future__ import annotations

import sys
from pathlib import Path

from .emit import translate
from .parse import TranslationError, parse


def main() -> int:
    source, target = (Path(name) for name in sys.argv[1:])
    try:
        target.write_text(translate(parse(source.read_text()), source.name))
    except TranslationError as error:
        print(f"ptx_to_cpp: {error}", file=sys.stderr)
        return 1
    return 0


sys.exit(main())
