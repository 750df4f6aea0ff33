"""accelerate_sdpa for jagged nested tensors, which never come to the dispatcher's operators."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sdpa_support import OURS, needs_kernels, operators_of

import anyflash

pytestmark = [pytest.mark.providers, needs_kernels]
LENGTHS = [3, 7, 1, 5]
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def sequences(lengths, heads=4, dtype=torch.float32):
    return [torch.randn(n, heads, 16).to(dtype) for n in lengths]


def jagged(tensors):
    """(batch, seqlen, heads, head_dim), a leaf."""
    return torch.nested.nested_tensor(tensors, layout=torch.jagged, requires_grad=True)


def attend(q, k, v, **options):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)


def one_by_one(sequences_of, dout, **options):
    """The outputs and gradients of each sequence, in float64, end to end."""
    parts = []
    for *qkv, rows in zip(*sequences_of, dout):
        leaves = [x.double().requires_grad_() for x in qkv]
        out = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in leaves), **options)
        out = out[0].transpose(0, 1)
        parts.append((out, *torch.autograd.grad(out, leaves, rows.double())))
    return [torch.cat(x) for x in zip(*parts)]


def check(lengths, dtype=torch.float32, heads_k=4, lengths_k=None, **options):
    torch.manual_seed(0)
    parts = [sequences(lengths, 4, dtype)]
    parts += [sequences(lengths_k or lengths, heads_k, dtype) for _ in "kv"]
    dout = sequences(lengths, 4, dtype)
    if heads_k != 4:
        options["enable_gqa"] = True

    def run():
        leaves = [jagged(x) for x in parts]
        out = attend(*leaves, **options).transpose(1, 2)
        gradients = torch.autograd.grad(out.values(), leaves, torch.cat(dout))
        return [x.values() for x in (out, *gradients)]

    with anyflash.accelerate_sdpa():
        found, called = operators_of(run)
    assert called == OURS
    for x, wanted in zip(found, one_by_one(parts, dout, **options)):
        torch.testing.assert_close(x.double(), wanted, atol=TOLERANCES[dtype], rtol=1e-3)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads_k", [4, 2])
def test_values_and_gradients(dtype, is_causal, heads_k):
    check(LENGTHS, dtype, heads_k, is_causal=is_causal)


def test_scale_and_keys_of_other_lengths():
    check(LENGTHS, scale=0.7, is_causal=True)
    check(LENGTHS, lengths_k=[9, 2, 4, 4])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.booleans())
def test_any_lengths(lengths, is_causal):
    check(lengths, is_causal=is_causal)


def test_it_keeps_the_jagged_dimension_and_comes_off_again():
    x = jagged(sequences(LENGTHS))
    with anyflash.accelerate_sdpa():
        out = attend(x, x, x, is_causal=True).transpose(1, 2)
        assert out.shape == x.shape  # the same jagged size, so that they can be added
        (out + x).values().sum().backward()
    _, called = operators_of(lambda: attend(x, x, x))
    assert called == []


def test_the_rest_stays_pytorchs():
    x, other = jagged(sequences(LENGTHS)), jagged(sequences([7, 3, 5, 1]))
    with anyflash.accelerate_sdpa():
        with anyflash.backend("math"):
            assert operators_of(lambda: attend(x, x, x))[1] == []
        doubles = jagged(sequences(LENGTHS, dtype=torch.float64))
        assert operators_of(lambda: attend(doubles, doubles, doubles))[1] == []
        with pytest.raises(RuntimeError):  # it has nothing for causal ones on a CPU
            attend(x, other, other, is_causal=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def function(x):
        return attend(x * 2, x, x, is_causal=True).transpose(1, 2) + x

    def both(function, x):
        out = function(x).values()
        return out, *(y.values() for y in torch.autograd.grad(out.square().sum(), x))

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    with anyflash.accelerate_sdpa():
        for lengths in (LENGTHS, [2, 2]):
            x = jagged(sequences(lengths))
            found, called = operators_of(lambda x=x: both(compiled, x))
            assert set(called) == set(OURS)  # tracing calls them too
            torch.testing.assert_close(found, both(function, x))
    torch._dynamo.reset()
