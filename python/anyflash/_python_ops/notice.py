"""Nothing is silent: the first time a call does not run on the first back end of its chain, one
line says so, and at a lower level what runs where all is well (csrc/notice.cpp)."""

from __future__ import annotations

import logging

from .._defs import feature_phrases
from .dispatch import Decision, Problem, routes

_LOGGER = logging.getLogger("anyflash")

_PHRASES = {
    "aten_cudnn": "cuDNN's attention in PyTorch (aten_cudnn)",
    "aten_flash": "PyTorch's flash attention (aten_flash)",
    "aten_efficient": "PyTorch's memory-efficient attention (aten_efficient)",
    "aten_cpu": "PyTorch's CPU attention (aten_cpu)",
    "math": "plain PyTorch operators (math)",
}

_told: set[str] = set()
_told_problems: set[tuple[Problem, str]] = set()


def _back_end_of(problem: Problem, route: str) -> str:
    """The name in a chain that stands for the route."""
    if problem.op != "attention":
        return "math"
    chains = {row.name: row.chain for row in routes()}
    return route if chains[route] == "named" else chains[route]


def notice_text(problem: Problem, decision: Decision) -> str:
    """``anyflash: attention runs on ..., because ...``."""
    why = "; ".join(
        f"{route}: {text}"
        for route, text in decision.reasons
        if not text.startswith("runs on ")  # another device's route is no news
    )
    last_resort = problem.op == "attention" and decision.route == "math"
    remedy = 'with anyflash.backend("math")' if last_resort else "ANYFLASH_BACKEND=sdpa,math"
    return (
        f"anyflash: {problem.op} runs on {_PHRASES[decision.route]}, because {why}. "
        f"To choose it yourself: {remedy}. To make it an error: ANYFLASH_STRICT=1. "
        "The whole decision: python -m anyflash explain. This is said once."
    )


def choice_text(problem: Problem, route: str) -> str:
    """``anyflash: attention forward, bf16, head_dim 128, causal: runs on ...``."""
    dims = f", head_dim {problem.head_dim}" if problem.head_dim > 0 else ""
    if problem.head_dim_v != problem.head_dim:
        dims += f"/{problem.head_dim_v}"
    features = "".join(f", {name}" for name in feature_phrases() if name in problem.features)
    what = f"{problem.op} {problem.direction}, {problem.dtype}{dims}{features}"
    return f"anyflash: {what}: runs on {_PHRASES[route]}"


def note_choice(problem: Problem, decision: Decision) -> None:
    """Tells once what runs: a warning unless it is the first choice."""
    key = (problem, decision.route)
    if key in _told_problems:
        return
    _told_problems.add(key)
    first, attention = problem.chain[0], problem.op == "attention"
    if first in (decision.route, _back_end_of(problem, decision.route)):
        level, text = logging.INFO, choice_text(problem, decision.route) if attention else ""
    elif attention or first == "kernel":
        level, text = logging.WARNING, notice_text(problem, decision)
    else:
        return
    if text and text not in _told:
        _told.add(text)
        _LOGGER.log(level, "%s", text)
