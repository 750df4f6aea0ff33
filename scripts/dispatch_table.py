"""Writes the tables of what runs where into README.md and docs/dispatch.md.

    python scripts/dispatch_table.py           # write
    python scripts/dispatch_table.py --check   # exit 1 if a table is not current

Routes come from core/routes.def and core/checked_routes.def, kernels from kernels/instances.def,
their speed from core/measured.def, features from kernels/features.def, choices from `decide`.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT / "python"))

from anyflash import _defs  # noqa: E402
from anyflash.explain import BACKWARD_ONLY, ROUTE_TITLES, explain  # noqa: E402

END = "<!-- end of table -->"

Columns = dict[str, dict[str, Any]]  # name: what `explain` is told beside the shape
DEVICES: Columns = {
    "CPU (avx512)": {"device": "cpu", "isa": "avx512", "torch_version": 213},
    "T4 (sm_75)": {"sm": 75, "torch_version": 213},
    "A100 (sm_80)": {"sm": 80, "torch_version": 213},
    "H100 (sm_90)": {"sm": 90, "torch_version": 213},
    "AMD, Intel, Apple GPU": {"device": "hip", "torch_version": 213},
}
OLD_TORCH: Columns = {
    "T4, torch 2.0": {"sm": 75, "torch_version": 200},
    "T4, torch 2.1": {"sm": 75, "torch_version": 201},
    "T4, torch 2.4": {"sm": 75, "torch_version": 204},
}
SHAPES = (
    ("fp16, head_dim 128, causal", "fp16 causal head_dim 128"),
    ("bf16, head_dim 128, causal", "bf16 causal head_dim 128"),
    ("fp32, head_dim 64", "fp32 head_dim 64"),
    ("fp16, packed sequences", "fp16 packed causal head_dim 64"),
    ("fp16, sliding window", "fp16 causal window head_dim 128"),
    ("fp16, paged key/value cache", "fp16 paged seqused_k causal head_dim 128"),
    ("fp16, ALiBi", "fp16 causal alibi head_dim 64"),
    ("fp16, additive bias", "fp16 bias head_dim 64"),
    ("fp16, softcap", "fp16 causal softcap head_dim 256"),
    ("fp16, dropout", "fp16 causal dropout head_dim 64"),
    ("fp16, head_dim 512", "fp16 causal head_dim 512"),
)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _routes(words: str, training: bool, **where: Any) -> list[str]:
    """The route of each direction."""
    answer = explain(words, training=training, backend="auto", **where)
    return [decision["route"] for decision in answer.decisions]


def _choices(columns: Columns) -> str:
    """Which route runs which shape where: of inference, and of training where it is
    another."""
    rows = []
    for label, words in SHAPES:
        cells = []
        for where in columns.values():
            (alone,) = _routes(words, False, **where)
            forward, backward = _routes(words, True, **where)
            if backward == "none":
                cells.append(f"{alone}, no backward")
            elif forward != alone:
                cells.append(f"{alone}, training {' and '.join({forward: 0, backward: 0})}")
            else:
                cells.append(alone if backward == alone else f"{alone}, backward {backward}")
        rows.append([label, *cells])
    return _markdown(["shape", *columns], rows)


def choices() -> str:
    return _choices(DEVICES)


def old_torch() -> str:
    return _choices(OLD_TORCH)


def routes() -> str:
    """routes.def, row by row."""
    features = _defs.feature_phrases()
    rows = []
    for entry in _defs.entries("routes"):
        if entry.macro != "ROUTE":
            continue
        name, back_end, device, sm, dtypes, top, multiple, torch, forward, backward = entry.fields
        where = {"cpu": "CPU", "any": "everywhere"}.get(device, f"GPU, sm_{sm} or newer")
        rows.append([
            f"`{name}`: {ROUTE_TITLES[name]}",
            _tried_by(name, back_end),
            where,
            dtypes.replace("|", ", "),
            _head_dims(top, multiple),
            f"{int(torch) // 100}.{int(torch) % 100}",
            _lacking((name for name in features if name not in BACKWARD_ONLY), forward),
            _lacking(features, backward),
        ])  # fmt: skip
    header = ["route", "back end", "runs on", "dtypes", "head_dim", "torch from"]
    return _markdown([*header, "forward lacks", "backward lacks"], rows)


def _tried_by(route: str, back_end: str) -> str:
    """The back end of a route, and where it tries a route that has to pass first."""
    name, wants_check, _ = back_end.partition("_once_checked")
    if not wants_check:
        return f"`{name}`"
    passed = [
        f"sm_{sm} from torch {int(torch) // 100}.{int(torch) % 100}"
        for checked, sm, torch in (entry.fields for entry in _defs.entries("checked_routes"))
        if checked == route and torch != "none"
    ]
    return f"`{name}` on {', '.join(passed)}; else by name" if passed else "by name only"


def _head_dims(top: str, multiple: str) -> str:
    return f"1 to {top}" if multiple == "1" else f"multiples of {multiple} up to {top}"


def _lacking(features: Iterable[str], supported: str) -> str:
    missing = [name for name in features if name not in _defs.features(supported)]
    return ", ".join(f"`{name}`" for name in missing) or "nothing"


def features() -> str:
    rows = [[f"`{name}`", phrase] for name, phrase in _defs.feature_phrases().items()]
    return _markdown(["name", "meaning"], rows)


def _passed_on(family: str, arch: str, direction: str) -> str:
    """The GPUs on which some code of these lines passed."""
    found = {
        int(sm)
        for line, sm, _ in (entry.fields for entry in _defs.entries("checked"))
        if line.startswith(f"{family}_{direction}_") and line.endswith(f"_{arch}")
    }
    return ", ".join(f"sm_{sm}" for sm in sorted(found)) or "none"


def kernels() -> str:
    """instances.def, a row for the dtypes of a family, an architecture and a direction."""
    dtypes: dict[tuple[str, ...], list[str]] = {}
    for entry in _defs.entries("instances"):
        arch, direction, *rest = entry.fields
        family = entry.macro.lower()
        if entry.macro == "KVCACHE_APPEND":
            direction, rest = "forward", [direction, *rest]
        if entry.macro == "ROWWISE":
            family, (direction, *rest) = direction, rest
        dims, lacks = "any", "nothing"
        if entry.macro == "ATTENTION":
            dims = _head_dims(rest[1], rest[2])
            asked = _defs.feature_phrases()
            if direction == "forward":
                asked = [name for name in asked if name not in BACKWARD_ONLY]
            lacks = _lacking(asked, rest[3])
        row = (family, arch, direction, dims, lacks, rest[-1])
        dtypes.setdefault(row, []).append(rest[0])
    rows = [
        [family, arch, direction, ", ".join(names), dims, lacks]
        + [_passed_on(family, arch, direction) if checked_on == "code" else checked_on]
        for (family, arch, direction, dims, lacks, checked_on), names in dtypes.items()
    ]
    header = ["family", "architecture", "direction", "dtype", "head_dim", "lacks", "checked on"]
    return _markdown(header, rows)


def measured() -> str:
    """measured.def, row by row."""
    rows = []
    for entry in _defs.entries("measured"):
        level, direction, dtype, top, worst, median = entry.fields
        where = f"sm_{level}" if level.isdigit() else level
        ratios = [f"{float(ratio):.2f}x" for ratio in (median, worst)]
        rows.append([where, direction, dtype, f"1 to {top}", *ratios])
    header = ["CPU or GPU", "direction", "dtype", "head_dim", "median", "at worst"]
    return _markdown(header, rows)


Tables = dict[str, Callable[[], str]]
PAGES: dict[str, Tables] = {
    "README.md": {"choices": choices},
    "docs/dispatch.md": {
        "choices": choices,
        "old_torch": old_torch,
        "routes": routes,
        "features": features,
        "kernels": kernels,
        "measured": measured,
    },
}


def current(path: pathlib.Path, tables: Tables, script: str = "dispatch_table.py") -> str:
    """The page with the tables that a script writes made anew."""
    text = path.read_text()
    for name, make in tables.items():
        mark = f"<!-- {name}: python scripts/{script} -->"
        head, found, rest = text.partition(mark)
        if not found:
            raise ValueError(f"{path.name} has no mark {mark}")
        text = f"{head}{mark}\n{make()}\n{END}{rest.partition(END)[2]}"
    return text


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = []
    for name, tables in PAGES.items():
        path = CHECKOUT / name
        text = current(path, tables)
        if text != path.read_text():
            stale.append(name)
            if not check:
                path.write_text(text)
    for name in stale:
        print(f"{name}: {'not current; run scripts/dispatch_table.py' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
