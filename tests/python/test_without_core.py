"""The package without its libraries: every case as plain operators, and refusals instead of wrong
numbers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import write_lists

import anyflash

RUN = """
import torch, anyflash
from anyflash import _core, _loader
from anyflash.testing import CORRECTNESS, assert_close, expect, make_inputs

assert _core.library is None and _loader.provider == "python"
by_pytorch = 0
for case in CORRECTNESS:
    inputs = make_inputs(case, "cpu")
    graded = inputs.differentiable() if case.differentiable else {}
    for x in graded.values():
        x.requires_grad_()
    out, lse = anyflash.attention(*inputs.qkv, **inputs.options, return_lse=True)
    found = {"out": out, "lse": lse}
    if graded:
        gradients = torch.autograd.grad(out, tuple(graded.values()), inputs.dout)
        found.update({name: x for name, x in zip(graded, gradients)})
    alone = anyflash.attention(*inputs.qkv, **inputs.options)
    found_alone = {"out": alone}
    if graded:
        gradients = torch.autograd.grad(alone, tuple(graded.values()), inputs.dout)
        found_alone.update({name: x for name, x in zip(graded, gradients)})
        by_pytorch += "AttentionFunction" not in type(alone.grad_fn).__name__
    expected = expect(inputs, gradients=bool(graded), dlse=False)
    for name, x in found_alone.items():
        assert_close(x, expected.exact[name], expected.low[name], f"{case.name} {name} alone")
    for name, x in found.items():
        assert_close(x, expected.exact[name], expected.low[name], f"{case.name} {name}")
assert by_pytorch > 10, by_pytorch
q = torch.randn(1, 9, 2, 8, requires_grad=True)
anyflash.attention(q, q, q, dropout_p=0.5).sum().backward()  # draws its bits
assert q.grad.isfinite().all()
print(len(CORRECTNESS), anyflash.decide({"device": "cpu", "dtype": "fp32"})["route"])
"""

WRONG = """
import torch, anyflash
q, k = torch.randn(4, 2, 8), torch.randn(6, 2, 8)
ints = lambda *x: torch.tensor(x, dtype=torch.int32)
dense = torch.randn(1, 4, 2, 8)
packed = dict(max_seqlen_q=4, max_seqlen_k=6)
calls = {
    "head_dim": lambda: anyflash.attention(dense, dense[..., :4], dense),
    "heads": lambda: anyflash.attention(torch.randn(1, 4, 3, 8), dense, dense),
    "dtype": lambda: anyflash.attention(dense, dense.double(), dense),
    "cu_seqlens_k": lambda: anyflash.attention(
        q, k, k, cu_seqlens_q=ints(0, 4), cu_seqlens_k=ints(0, 9), **packed
    ),
    "decreasing": lambda: anyflash.attention(
        q, k, k, cu_seqlens_q=ints(0, 4, 2), cu_seqlens_k=ints(0, 3, 6), **packed
    ),
    "seqused_k": lambda: anyflash.attention(dense, dense, dense, seqused_k=ints(9)),
    "strict": lambda: anyflash.attention(dense, dense, dense, backend="kernel"),
    "batch": lambda: anyflash.attention(torch.cat([dense, dense]), dense, dense),
    "batch of lengths": lambda: anyflash.attention(*[dense.expand(2, -1, -1, -1)] * 3,
                                                   seqused_k=ints(1)),
    "leftpad_k": lambda: anyflash.attention(dense, dense, dense, leftpad_k=ints(-1)),
    "bias, too many keys": lambda: anyflash.attention(dense, dense, dense,
                                                      bias=torch.zeros(4, 5)),
    "bias, too many rows": lambda: anyflash.attention(dense, dense, dense,
                                                      bias=torch.zeros(5, 4)),
    "bias, too many sequences": lambda: anyflash.attention(dense, dense, dense,
                                                           bias=torch.zeros(2, 1, 4, 4)),
    "softmax_scale": lambda: anyflash.attention(dense, dense, dense, softmax_scale=float("nan")),
    "sinks": lambda: anyflash.attention(dense, dense, dense, sinks=torch.zeros(1)),
    "alibi_slopes": lambda: anyflash.attention(dense, dense, dense, alibi_slopes=torch.zeros(1)),
    "block_table": lambda: anyflash.attention(
        dense.expand(2, -1, -1, -1), dense, dense, block_table=ints(0, 0).view(1, 2),
        seqused_k=ints(4, 4),
    ),
}
computed = []
for name, call in calls.items():
    try:
        call()
    except RuntimeError:
        continue
    computed.append(name)
assert not computed, computed
print("refused", len(calls))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A copy of the package as an installation without a compiler has it."""
    folder = tmp_path_factory.mktemp("plain")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    shutil.copytree(Path(anyflash.__file__).parent, folder / "anyflash", ignore=ignored)
    write_lists(folder / "anyflash")
    return folder


def _run(package: Path, program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(package)!r})\n{program}"],
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_case_as_plain_operators(package):
    count, route = _run(package, RUN).split()
    assert int(count) > 20
    assert route == "aten_sdpa"


EXPLAIN = """
import torch, anyflash
from anyflash import _core, explain

assert _core.library is None
q = torch.ones(1, 3, 2, 8, requires_grad=True)
for options in ({}, dict(causal=True), dict(softcap=1.0), dict(return_lse=True)):
    out = anyflash.attention(q, q, q, **options)
    is_ours = "AttentionFunction" in type(out[0].grad_fn if options.get("return_lse") else
                                          out.grad_fn).__name__
    forward, backward = explain(q, q, q, **options).decisions
    assert forward["route"] == backward["route"] == ("math" if is_ours else "aten_sdpa"), options
forward, _ = explain("softcap lse training").decisions
assert dict(forward["reasons"])["aten_sdpa"] == "does not support softcap, lse", forward
assert [name for name, _ in explain("fp32").decisions[0]["reasons"]] == ["kernel"]
assert [name for name, _ in explain("mlp").decisions[0]["reasons"]] == ["kernel"]
"""


def test_what_is_explained_is_what_runs(package):
    _run(package, EXPLAIN)


def test_what_does_not_fit_is_refused(package):
    assert _run(package, WRONG).startswith("refused")
