"""The cases of anyflash.testing on the CUDA kernels, forward and backward, on the emulator.

python tests/emulated/gradients.py LIBRARY

LIBRARY is libkernels_on_emulator.so. Writes as JSON the names of the cases that ran, and what was
wrong.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import torch
from training import stand_in_for_gpu

import anyflash
from anyflash.testing import CORNER, CORRECTNESS, Case, assert_close, expect, make_inputs


def run(case: Case) -> None:
    """Raises what is wrong: AssertionError, or the RuntimeError of a refusal."""
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


def main() -> None:
    stand_in_for_gpu(pathlib.Path(sys.argv[1]))
    ran, wrong = [], []
    for case in CORRECTNESS + CORNER:
        if case.dtype in ("fp32", "fp64"):
            case = dataclasses.replace(case, dtype="bf16")
        try:
            run(case)
        except (AssertionError, RuntimeError) as problem:
            wrong.append([case.name, str(problem)])
        else:
            ran.append(case.name)
    print(json.dumps({"ran": ran, "wrong": wrong}))


if __name__ == "__main__":
    main()
