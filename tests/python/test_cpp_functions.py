"""anyflash/attention.h, the functions for LibTorch programs: every case, forward and backward,
against the float64 reference, and what has no derivative."""

from __future__ import annotations

from pathlib import Path

import cpp_builds
import pytest
import torch
from support import expected_of, inputs_of, run_python, torch_version

import anyflash
from anyflash.testing import CORNER, CORRECTNESS, assert_close

pytestmark = [
    pytest.mark.providers,
    pytest.mark.skipif(torch_version() < 210, reason="the header needs LibTorch 2.10"),
    pytest.mark.skipif(cpp_builds.compiler() is None, reason="needs a C++ compiler"),
]

CASES = [pytest.param(case, id=case.name) for case in CORRECTNESS + CORNER]


@pytest.fixture(scope="module")
def library():
    source = Path(__file__).with_name("cpp_functions.cpp")
    return cpp_builds.shared_library(source, "-Wall", "-Wextra", "-Werror")


@pytest.fixture(scope="module")
def functions(library):
    torch.ops.load_library(str(library))
    return torch.ops.anyflash_header


def _results(functions, inputs, leaves, **more):
    options = {name: leaves.get(name, x) for name, x in inputs.options.items()}
    return functions.attention(*(leaves[name] for name in "qkv"), **options, **more)


@pytest.mark.parametrize("case", CASES)
def test_every_case(functions, case):
    inputs = inputs_of(case, "cpu")
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.differentiable().items()}
    with torch.no_grad():
        found = dict(zip(("out", "lse"), _results(functions, inputs, leaves)))
    if case.differentiable:
        expected = expected_of(case, "cpu", gradients=True)
        results = _results(functions, inputs, leaves)
        gradients = torch.autograd.grad(results, list(leaves.values()), [inputs.dout, inputs.dlse])
        found.update(zip(leaves, gradients))
    else:
        expected = expected_of(case, "cpu")
    for name, value in found.items():
        what = f"{case.name} {name}"
        assert_close(value, expected.exact[name], expected.low[name], what)


def _qkv(*shape, **options):
    return [torch.randn(shape, **options) for _ in "qkv"]


def test_packed_forms(functions):
    q, k, v = _qkv(2, 33, 4, 32)
    expected = anyflash.attention(q, k, v, causal=True)
    qkv, kv = torch.stack([q, k, v], 2), torch.stack([k, v], 2)
    torch.testing.assert_close(functions.qkvpacked(qkv), expected)
    torch.testing.assert_close(functions.kvpacked(q, kv), expected)
    lengths = torch.tensor([0, 33, 66], dtype=torch.int32)
    flat = functions.varlen_qkvpacked(qkv.flatten(0, 1), lengths, 33)
    torch.testing.assert_close(flat, expected.flatten(0, 1))
    flat = functions.varlen_kvpacked(q.flatten(0, 1), kv.flatten(0, 1), lengths, 33)
    torch.testing.assert_close(flat, expected.flatten(0, 1))


def test_gradients_of_a_packed_tensor(functions):
    qkv = torch.randn(2, 33, 3, 4, 32, requires_grad=True)
    (found,) = torch.autograd.grad(functions.qkvpacked(qkv).square().sum(), qkv)
    out = anyflash.attention(*qkv.unbind(2), causal=True)
    torch.testing.assert_close(found, *torch.autograd.grad(out.square().sum(), qkv))


def test_one_sequence_has_no_batch(functions):
    q, k, v = _qkv(33, 4, 32)
    for found, expected in zip(
        functions.attention(q, k, v), anyflash.attention(q, k, v, return_lse=True)
    ):
        torch.testing.assert_close(found, expected)


def test_lse_of_pages_where_a_gradient_is_recorded(library):
    """By a back end that computes it only where it is asked for."""
    code = f"""
import torch, anyflash
torch.ops.load_library({str(library)!r})
q, k, v = torch.randn(3, 2, 16, 4, 16)
table = torch.tensor([[0], [1]], dtype=torch.int32)
for x in (q, q.clone().requires_grad_()):
    lse = torch.ops.anyflash_header.attention(x, k, v, block_table=table)[1]
    print(lse.isfinite().all().item())
"""
    assert run_python(code, ANYFLASH_BACKEND="aten_sdpa,math").split() == ["True", "True"]


def test_undefined_tensors_are_none(functions):
    q, k, v = _qkv(2, 9, 4, 16)
    for found in functions.undefined_options(q, k, v):
        torch.testing.assert_close(found, anyflash.attention(q, k, v))


def test_only_what_is_asked_for_is_computed(functions):
    for needed in ("q", "k", "v", "qv"):
        leaves = [x.requires_grad_(n in needed) for n, x in zip("qkv", _qkv(2, 9, 4, 16))]
        sinks = torch.zeros(4)
        functions.attention(*leaves, sinks=sinks)[0].sum().backward()
        assert [x.grad is not None for x in leaves] == [n in needed for n in "qkv"]


def test_dropout_repeats_in_the_backward(functions):
    rng_state = torch.tensor([7, 9])
    for given in ({"rng_state": rng_state}, {}):
        q, k, v = (x.double().requires_grad_() for x in _qkv(1, 9, 2, 8))
        torch.manual_seed(0)
        out, _ = functions.attention(q, k, v, dropout_p=0.5, **given)
        found = torch.autograd.grad(out.square().sum(), (q, k, v))
        torch.manual_seed(0)
        expected = anyflash.attention(q, k, v, dropout_p=0.5, **given)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), (q, k, v)))


@pytest.mark.parametrize("interleaved", [True, False])
def test_kvcache(functions, interleaved):
    q, new_k, new_v = _qkv(2, 5, 4, 32)
    cos, sin = torch.randn(2, 40, 8)
    lengths = torch.tensor([3, 20], dtype=torch.int32)
    caches = [torch.randn(2, 40, 4, 32) for _ in "kv"]
    results = []
    for call in (functions.with_kvcache, anyflash.attention_kvcache):
        k_cache, v_cache = (cache.clone() for cache in caches)
        more = {"return_lse": True} if call is anyflash.attention_kvcache else {}
        out, lse = call(
            q, k_cache, v_cache, new_k, new_v, rotary_cos=cos, rotary_sin=sin,
            cache_seqlens=lengths, causal=True, rotary_interleaved=interleaved, **more,
        )  # fmt: skip
        results.append((out, lse, k_cache, v_cache))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)
    assert not torch.equal(results[0][2], caches[0])


def _leaf(x):
    return x.clone().requires_grad_()


Q, K, V = _qkv(2, 9, 4, 16)
PAGES = torch.zeros(2, 1, dtype=torch.int32)
REFUSED = {
    "paged": (
        lambda f: f.attention(_leaf(Q), K, V, block_table=PAGES)[0].sum().backward(),
        "block_table: paged attention has no gradient",
    ),
    "alibi_slopes": (
        lambda f: f.attention(Q, K, V, alibi_slopes=_leaf(torch.ones(4)))[0].sum().backward(),
        "alibi_slopes: attention has no gradient of the slopes",
    ),
    "kvcache": (
        lambda f: f.with_kvcache(_leaf(Q), K, V)[0].sum().backward(),
        "q, k, v: attention over a key/value cache has no gradient",
    ),
    "kvcache of a trained cache": (
        lambda f: f.with_kvcache(Q, _leaf(K), V)[0].sum().backward(),
        "q, k, v: attention over a key/value cache has no gradient",
    ),
    "shape": (
        lambda f: f.attention(Q, K, V[:, :3]),
        r"v: expected the shape of k.*\(2, 3, 4, 16\)",
    ),
    "dtype": (lambda f: f.attention(Q.half(), K, V), "q of fp16 and k of fp32"),
    "one sequence of q": (lambda f: f.attention(Q[0], K, V), "k, v: expected .seqlen_k, heads_k"),
    "qkv": (lambda f: f.qkvpacked(Q), r"qkv: expected \(batch, seqlen, 3, heads, head_dim\)"),
    "kv": (
        lambda f: f.varlen_kvpacked(Q, K, PAGES, 1),
        r"kv: expected \(total, 2, heads, head_dim",
    ),
    "no head_dim": (lambda f: f.attention(*[Q[..., :0]] * 3), "q: expected .*heads, head_dim"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_name_what_is_wrong(functions, what):
    call, text = REFUSED[what]
    with pytest.raises(RuntimeError, match=text):
        call(functions)


@pytest.mark.parametrize("loss", [torch.sum, lambda x: x.square().sum()], ids=["plain", "squared"])
def test_second_derivatives_are_refused(functions, loss):
    leaves = [_leaf(x) for x in (Q, K, V)]
    out, _ = functions.attention(*leaves)
    gradients = torch.autograd.grad(loss(out), leaves, create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="anyflash has no second derivative"):
            gradient.sum().backward(retain_graph=True)


def test_forward_mode_is_refused(functions):
    from torch.autograd import forward_ad

    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        functions.attention(forward_ad.make_dual(Q, Q), K, V)


def test_overwritten_inputs_are_noticed(functions):
    leaf = _leaf(Q)
    q = leaf * 1
    out, _ = functions.attention(q, K, V)
    q.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_an_overwritten_cache_is_noticed(functions):
    k_cache, scale = K.clone(), _leaf(torch.ones(()))
    product = (k_cache * scale).sum()
    row = torch.ones(2, 1, 4, 16)
    lengths = torch.zeros(2, dtype=torch.int32)
    functions.with_kvcache(Q[:, :1], k_cache, V.clone(), row, row, cache_seqlens=lengths)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
