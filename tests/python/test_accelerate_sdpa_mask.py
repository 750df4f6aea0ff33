"""accelerate_sdpa: masks that say where keys begin and end are read once and not handed on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sdpa_support import OURS, needs_kernels, operators_of

import anyflash
from anyflash import _sdpa_mask
from anyflash._sdpa_mask import key_ranges

pytestmark = pytest.mark.providers
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(_sdpa_mask, "_LEAST_WORK", 0)


def tensors(batch, seqlen_q, seqlen_k, dtype=torch.float32):
    torch.manual_seed(0)
    q = torch.randn(batch, seqlen_q, 4, 16).to(dtype).transpose(1, 2)
    k, v = (torch.randn(batch, 2, seqlen_k, 16).to(dtype) for _ in "kv")
    return [x.requires_grad_() for x in (q, k, v)]


def visible(ranges, seqlen_q, seqlen_k, causal):
    """(batch, 1, seqlen_q, seqlen_k), written out."""
    begin, end = (torch.tensor(x)[:, None, None, None] for x in zip(*ranges))
    place = torch.arange(seqlen_k)
    seen = ((begin <= place) & (place < end)).expand(-1, 1, seqlen_q, -1)
    last = end - seqlen_q + torch.arange(seqlen_q)[:, None]
    return seen & (place <= last) if causal else seen


def additive(seen):
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


@st.composite
def problems(draw):
    seqlen_q, seqlen_k = draw(st.integers(1, 9)), draw(st.integers(1, 20))
    begin = st.integers(0, seqlen_k)
    pair = begin.flatmap(lambda n: st.tuples(st.just(n), st.integers(n, seqlen_k)))
    return draw(st.lists(pair, min_size=1, max_size=3)), seqlen_q, seqlen_k, draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(problems(), st.booleans())
def test_what_it_finds_says_the_same(problem, expanded):
    ranges, seqlen_q, seqlen_k, causal = problem
    seen = visible(ranges, seqlen_q, seqlen_k, causal)
    q, k, _ = tensors(len(ranges), seqlen_q, seqlen_k)
    mask = additive(seen)
    if expanded and not causal:
        mask = mask[:, :, :1].expand(-1, 4, seqlen_q, -1)
    found = key_ranges(mask, q, k)
    assert found is not None
    pairs = list(zip(found.leftpad_k.tolist(), found.seqused_k.tolist()))
    assert torch.equal(visible(pairs, seqlen_q, seqlen_k, found.is_causal), seen)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_other_mask_is_taken_for_one(data):
    seqlen_q, seqlen_k = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    size = seqlen_q * seqlen_k
    bits = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    seen = torch.tensor(bits).view(1, 1, seqlen_q, seqlen_k)
    q, k, _ = tensors(1, seqlen_q, seqlen_k)
    found = key_ranges(additive(seen), q, k)
    if found is not None:
        pairs = [(int(found.leftpad_k), int(found.seqused_k))]
        assert torch.equal(visible(pairs, seqlen_q, seqlen_k, found.is_causal), seen)


def test_masks_that_say_more():
    q, k, _ = tensors(2, 3, 7)
    plain = torch.zeros(2, 1, 3, 7)
    assert key_ranges(plain, q, k) is not None
    for place in ((1, 0, 2, 3), (0, 0, 0, 0), (0, 0, 1, 6)):
        for value in (-1.0, 1e-9, torch.nan, torch.finfo(torch.float32).min, torch.inf):
            mask = plain.clone()
            mask[place] = value
            assert key_ranges(mask, q, k) is None, (place, value)
    assert key_ranges(torch.zeros(2, 4, 3, 7), q, k) is None  # of each head: not looked at
    assert key_ranges(torch.zeros(2, 1, 3, 1), q, k) is None
    assert key_ranges(torch.zeros(3, 7), q, k) is not None


def test_no_queries():
    q, k, _ = tensors(2, 0, 7)
    assert key_ranges(torch.zeros(2, 1, 0, 7), q, k) is None


def test_small_ones_are_not_looked_at(monkeypatch):
    q, k, _ = tensors(2, 3, 7)
    monkeypatch.setattr(_sdpa_mask, "_LEAST_WORK", k.numel() * 35 + 1)
    assert key_ranges(torch.zeros(2, 1, 3, 7), q, k) is None


@needs_kernels
@pytest.mark.parametrize("causal", [False, True])
def test_a_default_device_is_for_others(causal):
    q, k, v = tensors(2, 5, 5)
    mask = additive(visible([(0, 5), (2, 5)], 5, 5, causal))
    wanted = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    with anyflash.accelerate_sdpa(), torch.device("meta"):
        found = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    torch.testing.assert_close(found, wanted)


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(list(TOLERANCES)), st.booleans())
def test_values_and_gradients(problem, dtype, as_bool):
    ranges, seqlen_q, seqlen_k, causal = problem
    mask = visible(ranges, seqlen_q, seqlen_k, causal)
    if not as_bool:
        mask = additive(mask).to(dtype)
    inputs = tensors(len(ranges), seqlen_q, seqlen_k, dtype)
    dout = torch.randn(inputs[0].shape).to(dtype)

    def run():
        out = F.scaled_dot_product_attention(*inputs, mask, enable_gqa=True)
        return out, *torch.autograd.grad(out, inputs, dout)

    with anyflash.accelerate_sdpa():
        found, called = operators_of(run)
    assert called == OURS
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    if not as_bool:
        mask = mask.double()
    wanted = F.scaled_dot_product_attention(*doubles, mask, enable_gqa=True)
    wanted = (wanted, *torch.autograd.grad(wanted, doubles, dout.double()))
    tolerance = TOLERANCES[dtype]
    for x, y in zip(found, wanted):
        torch.testing.assert_close(x.double(), y, atol=tolerance, rtol=tolerance)
