"""accelerate_sdpa: PyTorch's scaled_dot_product_attention on anyflash's CPU kernels."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sdpa_support import LAYOUTS, OURS, Problem, call, needs_kernels, operators_of, strides
from support import run_python
from torch import nn
from tree import REPOSITORY

import anyflash
from anyflash import _doctor as doctor
from anyflash import sdpa
from anyflash.__main__ import main

pytestmark = pytest.mark.providers
ATEN = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATEN_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def nothing_stays_on():
    assert not sdpa.is_accelerated()
    yield
    assert not sdpa.is_accelerated()


MASKS = [(17, 17), (1, 17), (2, 1, 17, 17), (2, 1, 1, 17), (1, 4, 17, 1), (2, 4, 17, 17)]
DTYPES = list(TOLERANCES)
PROBLEMS = [
    *(Problem(dtype=dtype, causal=causal) for dtype in DTYPES for causal in (False, True)),
    *(Problem(dtype=dtype, mask="bool", mask_shape=shape) for dtype in DTYPES for shape in MASKS),
    *(Problem(mask="float", mask_shape=shape) for shape in MASKS),
    *(Problem(dtype=d, mask=m, mask_shape=(17, 17)) for d in DTYPES[1:] for m in ("float", "fp32")),
    *(Problem(dtype=d, mask="bool", mask_shape=(17, 17), hidden_row=True) for d in DTYPES),
    *(Problem(scale=scale) for scale in (2.0, 0.0, -0.5)),
    *(Problem(causal=True, scale=scale, layout="rows") for scale in (0.0, -0.5)),
    *(Problem(dtype=dtype, heads_k=n, causal=True) for dtype in DTYPES for n in (2, 1)),
    *(Problem(dtype=d, layout=layout) for d in DTYPES for layout in LAYOUTS),
    *(Problem(seqlen_q=n, seqlen_k=17, causal=True) for n in (18, 33)),
    *(Problem(seqlen_q=1, heads_k=2, dtype=dtype, layout="rows") for dtype in DTYPES),
    *(Problem(seqlen_q=130, seqlen_k=100, head_dim=dim) for dim in (1, 7, 80, 128)),
]
BY_PYTORCH = [
    Problem(dtype=torch.float64),
    Problem(seqlen_q=5, causal=True),
    Problem(seqlen_q=34, causal=True),
    Problem(head_dim=520),
]


def run(problem, tensors, dout):
    q, k, v, mask = tensors
    out = call(problem, q, k, v, mask)
    return out, *torch.autograd.grad(out, (q, k, v), dout)


def reference(problem, tensors, dout):
    """The same in float64, written out; a row without a key is 0."""
    q, k, v, mask = (
        x if x is None or x.dtype == torch.bool else x.detach().double() for x in tensors
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    group = problem.heads // problem.heads_k
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scale = problem.head_dim**-0.5 if problem.scale is None else problem.scale
    scores = q @ k.transpose(-2, -1) * scale
    hidden = torch.zeros(scores.shape, dtype=torch.bool)
    if problem.causal:
        hidden |= torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    if mask is not None and mask.dtype == torch.bool:
        hidden |= ~mask
    elif mask is not None:
        hidden |= mask == -torch.inf
        scores = scores + mask.masked_fill(mask == -torch.inf, 0)
    rows = hidden.all(-1, keepdim=True)
    probs = scores.masked_fill(hidden & ~rows, -torch.inf).softmax(-1).masked_fill(rows, 0)
    out = probs @ v
    return out, *torch.autograd.grad(out, inputs, dout.double())


def is_wrong_in_aten(problem):
    """Its causal mask comes before the scale: -inf times 0 or a negative number."""
    return problem.causal and problem.scale is not None and problem.scale <= 0


def check(problem):
    tensors = problem.tensors()
    dout = torch.randn(tensors[0].shape).to(problem.dtype)
    before = run(problem, tensors, dout)
    with anyflash.accelerate_sdpa():
        found, called = operators_of(lambda: run(problem, tensors, dout))
    tolerance = TOLERANCES.get(problem.dtype, 1e-10)
    for x, wanted, aten in zip(found, reference(problem, tensors, dout), before):
        torch.testing.assert_close(x.double(), wanted, atol=tolerance, rtol=tolerance)
        assert strides(x) == strides(aten)
        assert x.dtype == aten.dtype
    return called


@needs_kernels
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_values_and_gradients(problem):
    assert check(problem) == OURS


@pytest.mark.parametrize("problem", BY_PYTORCH, ids=str)
def test_what_has_no_kernel_is_pytorchs(problem):
    assert check(problem) == []


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        Problem,
        seqlen_q=st.integers(1, 70),
        seqlen_k=st.integers(1, 70),
        heads_k=st.sampled_from((1, 2, 4)),
        head_dim=st.integers(1, 40),
        dtype=st.sampled_from(DTYPES),
        causal=st.booleans(),
        layout=st.sampled_from(LAYOUTS),
    )
)
def test_any_shape(problem):
    check(problem)


@needs_kernels
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if not is_wrong_in_aten(p)], ids=str)
def test_results_of_the_operators_are_those_of_atens(problem):
    """The log-sum-exp too, which only a backward sees: either can take over from the other."""
    q, k, v, mask = (None if x is None else x.detach() for x in problem.tensors())
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    named = {"attn_mask": mask, "scale": problem.scale}
    wanted = ATEN(q, k, v, 0.0, problem.causal, **named)
    with anyflash.accelerate_sdpa():
        found, called = operators_of(lambda: ATEN(q, k, v, 0.0, problem.causal, **named))
    assert called == OURS[:1]
    fakes = ATEN(*(x.to("meta") for x in (q, k, v)), 0.0, problem.causal)
    for x, aten, fake in zip(found, wanted, fakes):
        torch.testing.assert_close(x.float(), aten.float(), atol=2e-2, rtol=2e-2)
        assert strides(x) == strides(aten) == strides(fake)
        assert x.dtype == aten.dtype == fake.dtype
    dout = torch.randn_like(q)
    gradients = []
    for out, lse in (wanted, found):
        for mode in (contextlib.nullcontext, anyflash.accelerate_sdpa):
            with mode():
                arguments = (dout, q, k, v, out, lse, 0.0, problem.causal)
                gradients.append(ATEN_BACKWARD(*arguments, **named))
    for other in gradients[1:]:
        for x, aten in zip(other, gradients[0]):
            torch.testing.assert_close(x.float(), aten.float(), atol=5e-2, rtol=5e-2)


@needs_kernels
def test_rows_that_a_finite_mask_hides_as_a_whole():
    problem = Problem(mask="float", mask_shape=(17, 17))
    q, k, v, mask = problem.tensors()
    mask.zero_()[3] = torch.finfo(torch.float32).min
    wanted = call(problem, q, k, v, mask)
    with anyflash.accelerate_sdpa():
        torch.testing.assert_close(call(problem, q, k, v, mask), wanted)


def test_dropout_stays_pytorchs():
    q, k, v, _ = Problem().tensors()
    torch.manual_seed(1)
    wanted = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(1)
    with anyflash.accelerate_sdpa():
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), wanted)


@needs_kernels
def test_a_mask_gets_its_gradient():
    problem = Problem()
    q, k, v, _ = problem.tensors()
    mask = torch.randn(17, 17, requires_grad=True)
    (wanted,) = torch.autograd.grad(call(problem, q, k, v, mask).sum(), mask)
    with anyflash.accelerate_sdpa():
        (found,) = torch.autograd.grad(call(problem, q, k, v, mask).sum(), mask)
    assert torch.equal(found, wanted)


@needs_kernels
def test_the_order_of_back_ends_counts():
    problem = Problem()
    tensors = problem.tensors()
    with anyflash.accelerate_sdpa(), anyflash.backend("aten_cpu"):
        assert operators_of(lambda: call(problem, *tensors))[1] == []
        q, k, v, _ = tensors
        anyflash.attention(*(x.transpose(1, 2) for x in (q, k, v)))  # the route calls aten's


@needs_kernels
def test_nothing_is_told(caplog):
    tensors = Problem(dtype=torch.float64).tensors()
    with anyflash.accelerate_sdpa(), caplog.at_level("WARNING"):
        call(Problem(), *tensors)
        call(Problem(), *Problem().tensors())
    assert not caplog.records


# ---- On and off.


def ours_run():
    problem = Problem()
    tensors = problem.tensors()
    return operators_of(lambda: call(problem, *tensors))[1] == OURS[:1]


@needs_kernels
def test_close_puts_the_kernels_back():
    first = anyflash.accelerate_sdpa()
    assert ours_run() and sdpa.is_accelerated()
    first.close()
    first.close()  # no harm
    assert not ours_run()
    with anyflash.accelerate_sdpa():
        assert ours_run()
    assert not ours_run()


@needs_kernels
def test_it_is_counted():
    outer = anyflash.accelerate_sdpa()
    with anyflash.accelerate_sdpa() as inner:
        assert ours_run()
    inner.close()  # no second time
    assert ours_run()
    other = anyflash.accelerate_sdpa()
    outer.close()
    assert ours_run()
    other.close()
    assert not ours_run()


@needs_kernels
def test_it_counts_for_all_threads():
    found = []
    with anyflash.accelerate_sdpa():
        thread = threading.Thread(target=lambda: found.append(ours_run()))
        thread.start()
        thread.join()
    assert found == [True]


def test_an_error_inside_undoes_it():
    with pytest.raises(KeyError), anyflash.accelerate_sdpa():
        raise KeyError


def test_a_torch_that_cannot_keep_its_kernels(monkeypatch):
    monkeypatch.delattr(torch.library, "get_kernel")
    with pytest.raises(RuntimeError, match="needs torch 2.9 or newer.* this is"):
        anyflash.accelerate_sdpa()


def test_the_fast_path_comes_back():
    mha = torch.backends.mha
    for before in (False, True):
        mha.set_fastpath_enabled(before)
        with anyflash.accelerate_sdpa(), anyflash.accelerate_sdpa():
            assert not mha.get_fastpath_enabled()
        assert mha.get_fastpath_enabled() == before


@needs_kernels
def test_the_variable(provider):
    code = """
import torch, anyflash
from anyflash import sdpa
q = torch.randn(1, 2, 8, 16)
with torch.autograd.profiler.profile() as profile:
    torch.nn.functional.scaled_dot_product_attention(q, q, q)
print(sum(e.name == "anyflash::_flash_attn_forward" for e in profile.function_events))
"""
    common = {"ANYFLASH_PROVIDER": provider}
    assert run_python(code, ANYFLASH_SDPA="1", **common) == "1\n"
    assert run_python(code, ANYFLASH_SDPA="0", **common) == "0\n"
    without = f"import torch; del torch.library.get_kernel{code}"
    assert run_python(without, ANYFLASH_SDPA="1", **common) == "0\n"


@needs_kernels
def test_the_line_of_the_readme_for_a_script(tmp_path):
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    line = next(x for x in lines if x.startswith("ANYFLASH_SDPA=1 python"))
    script = "import sys; from anyflash import sdpa; print(sdpa.is_accelerated(), sys.argv)"
    (tmp_path / "train.py").write_text(script)
    line = line.replace(" python ", f" {sys.executable} ")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    printed = subprocess.check_output(line, shell=True, cwd=tmp_path, text=True, env=environment)
    assert printed == "True ['train.py', '--its', 'options']\n"


def test_the_doctor_says_whether_it_is_on(capsys, monkeypatch):
    assert "ANYFLASH_SDPA" in doctor.ENVIRONMENT
    with anyflash.accelerate_sdpa():
        assert doctor.diagnose(probe=False).facts["torch"]["sdpa_accelerated"]
        main(["doctor", "--no-probe"])
        assert "SDPA        anyflash's kernels" in capsys.readouterr().out
    monkeypatch.setenv("ANYFLASH_SDPA", "1")
    monkeypatch.delattr(torch.library, "get_kernel")
    report = doctor.diagnose(probe=False)
    assert not report.facts["torch"]["sdpa_accelerated"]
    assert any("ANYFLASH_SDPA is set, but" in note["what"] for note in report.notes)


# ---- Modules.


@needs_kernels
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_layers(training, padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 9, 32)
    padding = torch.arange(9).expand(2, 9) >= torch.tensor([[9], [5]]) if padded else None

    def results():
        with torch.set_grad_enabled(training):
            out = layer(x, src_key_padding_mask=padding)
            if not training:
                return (out[:, :5],)  # the fast path zeroes the padding
            return out, *torch.autograd.grad(out.square().sum(), layer.parameters())

    wanted = results()
    with anyflash.accelerate_sdpa():
        found, called = operators_of(results)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert called == OURS[: 1 + training]


@needs_kernels
def test_an_encoder_with_padding():
    """Its fast path makes nested tensors of padded batches, and never calls the function."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 9, 32)
    padding = torch.arange(9).expand(2, 9) >= torch.tensor([[9], [5]])
    with torch.no_grad():
        wanted, called = operators_of(lambda: encoder(x, src_key_padding_mask=padding))
        assert called == []
        with anyflash.accelerate_sdpa():
            found, called = operators_of(lambda: encoder(x, src_key_padding_mask=padding))
    torch.testing.assert_close(found[~padding], wanted[~padding], atol=1e-5, rtol=1e-5)
    assert called == OURS[:1] * 2


@needs_kernels
def test_multihead_attention():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        wanted, _ = attention(x, x, x, need_weights=False)
        with anyflash.accelerate_sdpa():
            (found, _), called = operators_of(lambda: attention(x, x, x, need_weights=False))
    torch.testing.assert_close(found, wanted)
    assert called == OURS[:1]
