"""What several test files need and no user does."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import torch
from tree import REPOSITORY

import anyflash
from anyflash import _loader
from anyflash.testing import Case, Expected, Inputs, expect, make_inputs

sys.path.append(str(REPOSITORY / "tools"))
from shared_lists import write_lists  # noqa: E402, F401

# What the tests ask for by name; None is the default order.
ROUTES = {
    "cpu": (None, "kernel", "aten_cpu", "math"),
    "cuda": (None, "kernel", "aten_flash", "aten_efficient", "aten_cudnn", "math"),
    "standin": (None, "aten_sdpa", "math"),
}
ALL_ROUTES = (None, "kernel", "aten_cpu", "aten_flash", "aten_efficient", "aten_cudnn", "math")


def torch_version() -> int:
    major, minor = torch.__version__.split(".")[:2]
    return int(major) * 100 + int(minor)


def features_of(case: Case, *more: str) -> list[str]:
    """The features that a case needs, told from the case and not from the tensors."""
    longest_k = case.longest_k
    if case.paged:
        longest_k = (-(-max(case.seqlens_k) // case.page_size) + 1) * case.page_size
    left, right = (-1 if w >= longest_k else w for w in case.window)
    right = 0 if case.causal else right
    have = {
        "packed": case.packed,
        "paged": case.paged,
        "seqused_k": case.seqused_k is not None or case.layout == "paged",
        "leftpad_k": case.leftpad_k is not None,
        "causal": right == 0,
        "window": left >= 0 or right > 0,
        "softcap": case.softcap > 0,
        "alibi": bool(case.alibi),
        "bias": bool(case.bias),
        "sinks": case.sinks,
        "dropout": case.dropout > 0,
        "gqa": case.heads != case.heads_k,
        "unequal_head_dims": case.head_dim_v not in (0, case.head_dim),
    }
    return [name for name, there in have.items() if there] + list(more)


def problem_of(
    case: Case, direction: str, device: str, order: str | None, *more: str, return_lse: bool = True
) -> dict:
    """The value that `anyflash.decide` takes. ``more``: features that the case does not tell."""
    sm = 0
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        sm = 10 * major + minor
    return {
        "op": "attention",
        "device": "other" if device == "standin" else device,
        "sm": sm,
        "isa": _loader.cpu_isa() if device == "cpu" else "none",
        "direction": direction,
        "dtype": case.dtype,
        "head_dim": case.head_dim,
        "head_dim_v": case.head_dim_v or case.head_dim,
        "features": features_of(case, *["lse"] * return_lse, *more),
        "torch_version": torch_version(),
        "order": order.split(",") if order else ["kernel", "sdpa", "math"],
        "explicit": order is not None,
    }


def has_attention_kernels(device: str) -> bool:
    """Whether this build has attention kernels for 16-bit tensors that run here."""
    problem = problem_of(Case("plain", dtype="fp16"), "forward", device, "kernel")
    return anyflash.decide(problem)["route"] == "kernel"


@functools.cache
def inputs_of(case: Case, device: str) -> Inputs:
    return make_inputs(case, device)


@functools.cache
def expected_of(case: Case, device: str, gradients: bool = False, dlse: bool = True) -> Expected:
    """On the CPU always: the reference reads lengths and dropout bits element by element."""
    found = expect(inputs_of(case, "cpu"), gradients, dlse)
    return Expected(*({n: x.to(device) for n, x in results.items()} for results in found))


def run_python(code: str, *, timeout: float = 120, **environment: str) -> str:
    """Runs code in a fresh interpreter with this one's import path; returns what it printed."""
    env = {n: x for n, x in os.environ.items() if not n.startswith("ANYFLASH_")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    env.update(environment)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
