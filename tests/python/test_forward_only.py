"""Calls over a cache: they run under autograd, refuse a backward, and count as changes in place."""

from __future__ import annotations

import pytest
import torch

import anyflash
from anyflash.testing import reference_kvcache

pytestmark = pytest.mark.providers

HALF = torch.bfloat16


def _ints(*values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def _decode(device, dtype=torch.float32, seqlen=1):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, seqlen, 4, 16, device=device, dtype=dtype) for _ in "qkv")
    caches = [torch.randn(2, 16, 4, 16, device=device, dtype=dtype) for _ in "kv"]
    return q, caches, k, v


def _paged(q, k, v):
    device = q.device
    table = _ints(0, 1, 2, 3, device=device).view(2, 2)
    return anyflash.attention(
        q[:, 0], k, v, cu_seqlens_q=_ints(0, 1, 2, device=device), max_seqlen_q=1, max_seqlen_k=8,
        cu_seqlens_k=_ints(0, 3, 8, device=device), block_table=table,
    )  # fmt: skip


def _over_cache(q, k_cache, v_cache):
    return anyflash.attention_kvcache(q, k_cache, v_cache, cache_seqlens=7)


def _public(q, k_cache, v_cache):
    lengths = _ints(7, 7, device=q.device)
    return torch.ops.anyflash.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, causal=True
    )


CALLS = {
    "kvcache": (_over_cache, "attention over a key/value cache has no gradient"),
    "operator": (_public, "attention over a key/value cache has no gradient"),
    "paged": (_paged, "block_table: paged attention has no gradient"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("leaf", ["q", "k", "v"])
def test_a_backward_is_refused_and_never_zero(device, name, leaf):
    call, why = CALLS[name]
    q, caches, _, _ = _decode(device)
    if name == "paged":
        caches = [x.view(4, 8, 4, 16) for x in caches]
    tensors = dict(zip("qkv", (q, *caches)))
    right = call(*tensors.values())
    assert not right.requires_grad
    weight = torch.ones((), device=device, requires_grad=True)
    tensors[leaf] = tensors[leaf] * weight  # as a trainable layer before the call makes it
    out = call(*tensors.values())
    torch.testing.assert_close(out, right)
    with pytest.raises(RuntimeError, match=why):
        (out * 2).sum().backward()
    assert weight.grad is None


def test_the_appended_rows_are_bound_too(device):
    q, caches, k, v = _decode(device)
    k.requires_grad_()
    out = anyflash.attention_kvcache(q, *caches, k, v, cache_seqlens=3)
    assert torch.equal(caches[0][:, 3], k.detach()[:, 0])
    with pytest.raises(RuntimeError, match="has no gradient"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["kvcache", "paged"])
def test_a_compiled_graph_refuses_when_it_runs(device, name):
    torch._dynamo.reset()
    call, why = CALLS[name]
    q, caches, _, _ = _decode(device)
    if name == "paged":
        caches = [x.view(4, 8, 4, 16) for x in caches]
    right = call(q, *caches)
    q = q.requires_grad_()
    out = torch.compile(lambda q: call(q * 1.0, *caches), backend="aot_eager")(q)
    torch.testing.assert_close(out, right)
    with pytest.raises(RuntimeError, match=why):
        out.sum().backward()
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", [None, "math"])
@pytest.mark.parametrize("paged", [False, True])
def test_a_changed_cache_is_noticed(device, backend, paged):
    """A gradient that was to be computed from the old contents is refused."""
    q, caches, k, v = _decode(device)
    options = {}
    if paged:
        caches = [x.reshape(4, 8, 4, 16) for x in caches]
        options["block_table"] = _ints(0, 1, 2, 3, device=device).view(2, 2)
    weight = torch.ones_like(caches[0], requires_grad=True)
    product = (weight * caches[0]).sum()
    versions = [x._version for x in caches]
    with anyflash.backend(backend):
        anyflash.attention_kvcache(q, *caches, cache_seqlens=_ints(3, 3, device=device), **options)
        assert [x._version for x in caches] == versions  # read alone
        lengths = _ints(3, 3, device=device)
        anyflash.attention_kvcache(q, *caches, k, v, cache_seqlens=lengths, **options)
    assert all(x._version > old for x, old in zip(caches, versions))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("backend", [None, "math"])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "after it"])
def test_caches_made_in_inference_mode(device, inside, paged, backend):
    """They are written like any other, whoever appends: nothing counts their changes."""
    with torch.inference_mode():
        q, caches, k, v = _decode(device)
        options = {"cache_seqlens": _ints(3, 3, device=device)}
        if paged:
            caches = [x.view(4, 8, 4, 16) for x in caches]
            options["block_table"] = _ints(0, 1, 2, 3, device=device).view(2, 2)
    with torch.inference_mode(inside), anyflash.backend(backend):
        anyflash.attention_kvcache(q, *caches, k, v, **options)
    for cache, new in zip(caches, (k, v)):
        assert torch.equal(cache.view(2, 16, 4, 16)[:, 3], new[:, 0])


@pytest.mark.parametrize("cache", [HALF, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("new", [HALF, torch.float32], ids=str)
def test_autocast_gives_a_call_the_dtype_of_its_cache(device, cache, rotary, new):
    q, _, k, v = _decode(device)
    k, v = k.to(new), v.to(new)
    caches = [torch.zeros(2, 16, 4, 16, dtype=cache, device=device) for _ in range(4)]
    angle = torch.rand(16, 8, device=device)
    tables = {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()} if rotary else {}
    with torch.autocast(device, dtype=HALF):
        out = anyflash.attention_kvcache(q, *caches[:2], k, v, cache_seqlens=3, **tables)
    lengths = _ints(3, 3, device="cpu")
    tables = {n: x.to(cache).cpu() for n, x in tables.items()}
    right = reference_kvcache(
        *(x.to(cache).cpu() for x in (q, *caches[2:], k, v)), cache_seqlens=lengths, **tables
    )
    assert out.dtype == caches[0].dtype == cache
    tolerance = {"atol": 8 * torch.finfo(cache).eps, "rtol": 8 * torch.finfo(cache).eps}
    torch.testing.assert_close(out.cpu().double(), right[0].double(), **tolerance)
    torch.testing.assert_close(caches[0].cpu(), right[2], **tolerance)


@pytest.mark.parametrize("backend", ["math", "aten_sdpa"])
def test_autocast_does_not_reach_into_an_operator(device, backend):
    """What an operator multiplies has the dtype that it chose: here the cache's."""
    q, caches, _, _ = _decode(device)
    qkv = [x.float() for x in (q, *caches)]
    expected = anyflash.attention_kvcache(*qkv, cache_seqlens=3, backend=backend)
    with torch.autocast(device, dtype=HALF):
        found = anyflash.attention_kvcache(*qkv, cache_seqlens=3, backend=backend)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("pages", [HALF, torch.float32], ids=str)
def test_autocast_leaves_pages_where_they_are(device, pages):
    q, caches, _, _ = _decode(device)
    caches = [x.view(4, 8, 4, 16).to(pages) for x in caches]
    with torch.autocast(device, dtype=HALF):
        out = _paged(q, *caches)
    assert out.dtype == pages
    assert torch.equal(out, _paged(q.to(pages), *caches))
