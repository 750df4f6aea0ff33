"""The CPU kernels: every instruction set of this machine, threads, and their object code."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import REPOSITORY, expected_of, inputs_of, run_python

import anyflash
from anyflash.testing import CORNER, CORRECTNESS, assert_close

CASES = [case for case in CORRECTNESS + CORNER if case.dtype != "fp64"]
OBJECTS = REPOSITORY / "build/install/kernels/cpu"
ISAS = ("avx2", "avx512", "avx512bf16", "amx", "neon")


@pytest.fixture(scope="module", autouse=True)
def kernels(provider, device):
    if provider != "binary":
        pytest.skip("both providers launch the same kernels: the run of the binary shows them")
    if device != "cpu":
        pytest.skip("runs with --device cpu")


def _run(inputs) -> dict[str, torch.Tensor]:
    """out, lse and where there are any the gradients, by the names of `anyflash.testing.expect`."""
    differentiable = inputs.differentiable() if inputs.case.differentiable else {}
    leaves = {n: x.detach().requires_grad_() for n, x in differentiable.items()}
    options = {n: leaves.get(n, x) for n, x in inputs.options.items()}
    q, k, v = (leaves.get(n, x) for n, x in zip("qkv", inputs.qkv))
    out, lse = anyflash.attention(q, k, v, **options, return_lse=True, backend="kernel")
    results = {"out": out.detach(), "lse": lse.detach()}
    if leaves:
        found = torch.autograd.grad([out, lse], list(leaves.values()), [inputs.dout, inputs.dlse])
        results.update(zip(leaves, found))
    return results


RUN_ALL = """
import sys, torch, anyflash
sys.path.insert(0, {folder!r})
from support import inputs_of
from test_cpu_kernels import CASES, _run
torch.save({{case.name: _run(inputs_of(case, "cpu")) for case in CASES}}, {path!r})
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_case_on_every_instruction_set(isa, tmp_path):
    path = tmp_path / "results.pt"
    code = RUN_ALL.format(folder=str(Path(__file__).parent), path=str(path))
    try:
        run_python(code, ANYFLASH_CPU_ISA=isa, timeout=600)
    except AssertionError as error:
        if f"this CPU does not have '{isa}'" in str(error):
            pytest.skip(f"this CPU does not have {isa}")
        raise
    results = torch.load(path)
    assert len(results) == len(CASES)
    wrong = []
    for case in CASES:
        expected = expected_of(case, "cpu", gradients=case.differentiable)
        for name, found in results[case.name].items():
            try:
                exact, low = expected.exact[name], expected.low[name]
                assert_close(found, exact, low, f"{case.name} {name}")
            except AssertionError as error:
                wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


def _same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[n].nan_to_num(7.0), other[n].nan_to_num(7.0)) for n in one) and set(
        one
    ) == set(other)


def test_any_number_of_threads_gives_the_same_bits():
    before = torch.get_num_threads()
    try:
        for case in CASES:
            inputs = inputs_of(case, "cpu")
            torch.set_num_threads(1)
            alone = _run(inputs)
            torch.set_num_threads(2)
            assert _same(alone, _run(inputs)), case.name
    finally:
        torch.set_num_threads(before)


def test_callers_at_once():
    """A server's threads call with their own problems, and each call has threads of its own."""
    inputs = [inputs_of(case, "cpu") for case in CASES[::3]]
    alone = [_run(one) for one in inputs]
    with ThreadPoolExecutor(4) as callers:
        for case, one, together in zip(CASES[::3], alone, callers.map(_run, inputs)):
            assert _same(one, together), case.name


def _objects() -> list[Path]:
    objects = sorted(OBJECTS.glob("CMakeFiles/anyflash_cpu_*.dir/*.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("no build tree with objects, or no nm")
    return objects


def test_objects_share_no_code_with_others():
    """A weak function compiled for AVX-512 could be the one that the linker keeps for everybody."""
    for path in _objects():
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
        shared = re.findall(r"^[0-9a-f ]* ([VWuvw] .*)$", symbols.stdout, re.M)
        assert not shared, f"{path.name}: {shared}"


def test_size_of_the_object_code():
    total = 0
    for path in _objects():
        sizes = subprocess.run(["size", "-A", path], capture_output=True, text=True, check=True)
        total += sum(map(int, re.findall(r"^\.(?:text|rodata)\S*\s+(\d+)", sizes.stdout, re.M)))
    assert 0 < total <= 2.4 * 2**20, f"{total / 2**20:.2f} MiB"
