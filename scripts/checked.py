"""Lines for kernels/checked.def: the machine code of this installation that a GPU runs.

    python scripts/checked.py 90

For scripts/gpu_check.sh, after everything has passed on a GPU of that compute capability.
"""

from __future__ import annotations

import hashlib
import sys

from anyflash import _core


def lines(sm: int) -> list[str]:
    found = []
    for instance in _core.table():
        code = [c for c in _core.cubins(instance) if c.sm <= sm and c.sm // 10 == sm // 10]
        if code:
            newest = max(code, key=lambda cubin: cubin.sm)
            digest = hashlib.sha256(_core.machine_code(newest)).hexdigest()[:16]
            found.append(f"CHECKED({instance.name.decode()}, {sm}, {digest})")
    return found


if __name__ == "__main__":
    print(*lines(int(sys.argv[1])), sep="\n")
