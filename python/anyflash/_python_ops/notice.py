"""Nothing is silent: the first time a call does not run on the first back end of its chain, one
line says so (csrc/notice.cpp)."""

from __future__ import annotations

import logging

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


def note_fallback(problem: Problem, decision: Decision) -> None:
    """Tells what runs, unless it is the first choice or has been told."""
    key = (problem, decision.route)
    if key in _told_problems:
        return
    _told_problems.add(key)
    first = problem.chain[0]
    if first in (decision.route, _back_end_of(problem, decision.route)):
        return
    if problem.op != "attention" and first != "kernel":
        return
    text = notice_text(problem, decision)
    if text not in _told:
        _told.add(text)
        _LOGGER.warning("%s", text)
