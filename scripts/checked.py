"""Lines of what has passed on a GPU, for scripts/gpu_check.sh there.

python scripts/checked.py kernels 90   # for kernels/checked.def
python scripts/checked.py routes 90    # for core/checked_routes.def
"""

from __future__ import annotations

import hashlib
import pathlib
import sys

import anyflash
from anyflash import _core, _defs, _drivers

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "tools"))

import nvrtc  # noqa: E402


def routes(sm: int) -> list[str]:
    """The routes that wait for such a GPU, and have not passed with this torch or an older one."""
    torch_version = _core.torch_version()
    return [
        f"CHECKED({name}, {sm}, {torch_version})"
        for name, gpu, passed in (entry.fields for entry in _defs.entries("checked_routes"))
        if int(gpu) == sm
        and (passed == "none" or torch_version < int(passed))
        and anyflash.explain("fp16", sm=sm, backend=name).runs
    ]


def kernels(sm: int) -> list[str]:
    """The machine code of this installation that such a GPU runs. Refuses that of another compiler
    than the releases': nobody would have it."""
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
    print(*{"kernels": kernels, "routes": routes}[sys.argv[1]](int(sys.argv[2])), sep="\n")
