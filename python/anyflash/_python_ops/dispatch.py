"""The decision, as csrc/dispatch.cpp makes it: which route computes a problem, and why not the
others.

A pure function of values. A problem is a dict with the keys ``op``, ``device``, ``sm`` (of a GPU),
``isa`` (of a CPU), ``direction``, ``dtype``, ``head_dim``, ``head_dim_v``, ``features``,
``torch_version``, ``chain`` and ``explicit``; csrc/problem.h says what they mean.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from .. import _defs, backends

DTYPES = ("fp16", "bf16", "fp32", "fp64")
DIRECTIONS = ("forward", "backward")


class Route(NamedTuple):
    """A row of routes.def."""

    name: str
    chain: str
    device: str
    min_sm: int
    dtypes: tuple[str, ...]
    max_head_dim: int
    head_dim_multiple: int
    min_torch: int
    forward: frozenset[str]
    backward: frozenset[str]


class Problem(NamedTuple):
    """One call, without its lengths."""

    op: str = "attention"
    device: str = "cpu"
    sm: int = 0
    isa: str = "none"
    direction: str = "forward"
    dtype: str = "fp32"
    head_dim: int = 0
    head_dim_v: int = 0
    features: tuple[str, ...] = ()
    torch_version: int = 0
    chain: tuple[str, ...] = backends.DEFAULT_CHAIN
    explicit: bool = False


class Decision(NamedTuple):
    """The route ("none" if no route runs) and, in the order tried, why others were passed over."""

    route: str
    reasons: tuple[tuple[str, str], ...]


@functools.cache
def routes() -> tuple[Route, ...]:
    """The rows of routes.def."""

    def row(fields: tuple[str, ...]) -> Route:
        def parts(text: str) -> tuple[str, ...]:
            return tuple(part.strip() for part in text.split("|"))

        name, chain, device = fields[:3]
        max_head_dim, multiple, min_torch = (int(field) for field in fields[5:8])
        return Route(
            name,
            chain,
            device,
            int(fields[3]),
            parts(fields[4]),
            max_head_dim,
            multiple,
            min_torch,
            _defs.features(fields[8]),
            _defs.features(fields[9]),
        )

    return tuple(row(e.fields) for e in _defs.entries("routes") if e.macro == "ROUTE")


def _dtype_list(names: tuple[str, ...]) -> str:
    ordered = [name for name in DTYPES if name in names]
    return " or ".join([", ".join(ordered[:-1]), ordered[-1]] if len(ordered) > 1 else ordered)


def _version_text(version: int) -> str:
    return f"{version // 100}.{version % 100}"


def _head_dim_obstacles(route: Route, name: str, head_dim: int) -> Iterator[str]:
    if head_dim > route.max_head_dim:
        yield f"{name} {head_dim} is above {route.max_head_dim}"
    if head_dim % route.head_dim_multiple != 0:
        yield f"{name} {head_dim} is not a multiple of {route.head_dim_multiple}"


def _obstacles(route: Route, problem: Problem) -> Iterator[str]:
    if route.device not in ("any", problem.device):
        yield f"runs on {route.device} only"
        return
    on_cuda = problem.device == "cuda"
    if on_cuda and problem.sm < route.min_sm:
        yield f"needs sm_{route.min_sm} or newer, this GPU is sm_{problem.sm}"
    elif route.device == "cuda" and problem.dtype == "bf16" and problem.sm < 80:
        yield "bf16 needs sm_80"
    if problem.torch_version < route.min_torch:
        yield (
            f"needs torch {_version_text(route.min_torch)}, "
            f"this is {_version_text(problem.torch_version)}"
        )
    if problem.dtype not in route.dtypes:
        yield f"needs {_dtype_list(route.dtypes)}, got {problem.dtype}"
    yield from _head_dim_obstacles(route, "head_dim", problem.head_dim)
    if problem.head_dim_v != problem.head_dim:
        yield from _head_dim_obstacles(route, "head_dim_v", problem.head_dim_v)
    supported = route.forward if problem.direction == "forward" else route.backward
    for feature, phrase in _defs.feature_phrases().items():
        if feature in problem.features and feature not in supported:
            yield f"does not support {phrase}"


def _walk(problem: Problem) -> Iterator[tuple[str, list[str]]]:
    """The routes in the order of the chain, each with its obstacles."""
    for back_end in problem.chain or backends.DEFAULT_CHAIN:
        if back_end == "kernel":
            arch = "cpu" if problem.device == "cpu" else f"sm_{problem.sm}"
            yield "kernel", [f"this build has no {problem.op} kernel for {arch}"]
        elif problem.op != "attention":
            yield "math", []
        else:
            for route in routes():
                if back_end in (route.chain, route.name):
                    yield route.name, list(_obstacles(route, problem))


@functools.lru_cache(maxsize=1024)
def choose(problem: Problem) -> Decision:
    """The first route of the problem's chain without an obstacle, with the reasons against those
    before it.

    Kernels live in the binary, so for this provider the back end ``kernel`` has none.
    """
    reasons: list[tuple[str, str]] = []
    for route, obstacles in _walk(problem):
        if not obstacles:
            return Decision(route, tuple(reasons))
        reasons += [(route, text) for text in obstacles]
    return Decision("none", tuple(reasons))


def refusal(problem: Problem, decision: Decision) -> str:
    """The text of the error when nothing in the chain can run."""
    reasons = "; ".join(f"{route}: {text}" for route, text in decision.reasons)
    chain = ",".join(problem.chain)
    return f'anyflash: no back end of "{chain}" can run this {problem.op}: {reasons}'


def decide(problem: dict[str, Any]) -> dict[str, Any]:
    """The decision for a problem given as a dict.

    Returns:
        ``{"route": str, "instance": None, "measured": None, "reasons": [(route, text), ...]}``;
        the route is ``"none"`` if nothing runs.

    Raises:
        ValueError: an unknown key, back end, feature, dtype, direction, device or isa.
    """
    known = {
        "op": ("attention", "bias_activation"),
        "device": ("cpu", "cuda"),
        "isa": backends.ISAS,
        "direction": DIRECTIONS,
        "dtype": DTYPES,
    }
    for key in problem:
        if key not in Problem._fields:
            raise ValueError(f"problem: unknown key '{key}'; known: {', '.join(Problem._fields)}")
    for key, values in known.items():
        if key in problem and problem[key] not in values:
            raise ValueError(f"{key}: expected one of {', '.join(values)}, got '{problem[key]}'")
    for feature in problem.get("features", ()):
        if feature not in _defs.feature_phrases():
            raise ValueError(
                f"unknown feature '{feature}'; known: {', '.join(_defs.feature_phrases())}"
            )
    chain = problem.get("chain", backends.DEFAULT_CHAIN)
    names = backends.parse_chain(chain if isinstance(chain, str) else ",".join(chain))
    value = Problem(**{**problem, "features": tuple(problem.get("features", ())), "chain": names})
    decision = choose(value)
    kernel = {"instance": None, "measured": None}
    return {"route": decision.route, **kernel, "reasons": list(decision.reasons)}
