"""The cases of anyflash.testing and a few more on the CUDA kernels, on the emulator.

python tests/emulated/gradients.py LIBRARY

LIBRARY is libkernels_on_emulator.so. Writes as JSON the names of what passed, and what was
wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable

import torch
from training import stand_in_for_gpu

import anyflash
from anyflash.testing import CORNER, CORRECTNESS, Case, assert_close, expect, make_inputs


def run(case: Case) -> None:
    """Raises what is wrong: AssertionError, or the RuntimeError of a refusal."""
    if case.dtype in ("fp32", "fp64"):
        case = dataclasses.replace(case, dtype="bf16")
    inputs = make_inputs(case)
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.differentiable().items()}
    options = {n: leaves.get(n, x) for n, x in inputs.options.items()}
    qkv = (leaves[n] for n in "qkv")
    found = anyflash.attention(*qkv, **options, return_lse=True, backend="kernel")
    results = dict(zip(("out", "lse"), (x.detach() for x in found)))
    expected = expect(inputs, gradients=case.differentiable)
    if case.differentiable:
        gradients = torch.autograd.grad(found, list(leaves.values()), [inputs.dout, inputs.dlse])
        results.update(zip(leaves, gradients))
    for name, result in results.items():
        assert_close(result, expected.exact[name], expected.low[name], name)


def leaves() -> list[torch.Tensor]:
    return [torch.randn(1, 40, 2, 64, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]


def nan_is_kept(dropout_p: float) -> None:
    """A NaN in one row of the bias shows in that row's out, and in every gradient."""
    q, k, v = leaves()
    bias = torch.zeros(1, 2, 40, 40)
    bias[0, 1, 3, 5] = float("nan")
    bias.requires_grad_()
    out = anyflash.attention(q, k, v, bias=bias, dropout_p=dropout_p, backend="kernel")
    gradients = torch.autograd.grad(out.sum(), (q, k, v, bias))
    for name, x in zip(("out", "dq", "dk", "dv", "dbias"), (out, *gradients)):
        assert x.isnan().any(), f"no NaN in {name}"
        assert not x.isnan().all(), f"NaN in all of {name}"


def deterministic_bias(heads: int) -> None:
    """The same gradients twice, or a refusal, where one number belongs to both heads."""
    q, k, v = leaves()
    bias = torch.randn(1, heads, 40, 40).requires_grad_()
    try:
        first, second = (
            anyflash.attention(q, k, v, bias=bias, deterministic=True, backend="kernel")
            for _ in range(2)
        )
        gradients = [torch.autograd.grad(out.sum(), (q, k, v, bias)) for out in (first, second)]
    except RuntimeError as refused:
        assert heads == 1 and "a bias that broadcasts" in str(refused), refused
    else:
        assert heads == 2, "a bias that broadcasts is not refused"
        assert all(map(torch.equal, *gradients)), "other gradients"


CHECKS: dict[str, Callable[[], None]] = {
    **{case.name: functools.partial(run, case) for case in CORRECTNESS + CORNER},
    "nan": functools.partial(nan_is_kept, 0.0),
    "nan, dropout": functools.partial(nan_is_kept, 0.5),
    "deterministic, bias of its own": functools.partial(deterministic_bias, 2),
    "deterministic, bias that broadcasts": functools.partial(deterministic_bias, 1),
}


def main() -> None:
    stand_in_for_gpu(pathlib.Path(sys.argv[1]))
    ran, wrong = [], []
    for name, check in CHECKS.items():
        try:
            check()
        except (AssertionError, RuntimeError) as problem:
            wrong.append([name, str(problem)])
        else:
            ran.append(name)
    print(json.dumps({"ran": ran, "wrong": wrong}))


if __name__ == "__main__":
    main()
