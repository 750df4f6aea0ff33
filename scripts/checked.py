"""Lines for kernels/checked.def: the machine code of this installation that a GPU runs.

    python scripts/checked.py 90

For scripts/gpu_check.sh, after everything has passed on a GPU of that compute capability. Refuses
code of another compiler than that of the releases: nobody would have it.
"""

from __future__ import annotations

import hashlib
import pathlib
import sys

from anyflash import _core, _drivers

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "tools"))

import nvrtc  # noqa: E402


def lines(sm: int) -> list[str]:
    found = []
    built = _core.build_info()["nvrtc"]
    if built not in nvrtc.pin_for(sm):
        raise SystemExit(f"built with NVRTC {built}, releases with {nvrtc.pin_for(sm)}")
    for instance in _core.table():
        code = [cubin for cubin in _core.cubins(instance) if _drivers.runs_on(cubin.sm, sm)]
        if code:
            newest = max(code, key=lambda cubin: cubin.sm)
            digest = hashlib.sha256(_core.machine_code(newest)).hexdigest()[:16]
            found.append(f"CHECKED({instance.name.decode()}, {sm}, {digest})")
    return found


if __name__ == "__main__":
    print(*lines(int(sys.argv[1])), sep="\n")
