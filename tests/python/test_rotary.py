"""Rotary embedding: anyflash.rotary and its operators, any call against float64, derivatives."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn.layers.rotary import apply_rotary_emb_torch as FORMULA
from flash_attn.ops.triton.rotary import apply_rotary
from hypothesis import given, settings
from hypothesis import strategies as st
from rotary_support import angles, assert_close, reference, sample, weighted
from torch import Tensor

import anyflash

pytestmark = pytest.mark.providers

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# ---- Any call.

LAYOUTS = ("plain", "slice of qkv", "heads first", "columns apart", "padded columns")


def laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x, the memory it lies in); what is not x is NaN."""
    if layout == "slice of qkv":
        memory = torch.full((*shape[:-2], 3, *shape[-2:]), torch.nan, dtype=dtype)
        x = memory.select(-3, 1)
    elif layout == "heads first":
        order = [*shape[:-3], shape[-2], shape[-3], shape[-1]]
        memory = torch.full(order, torch.nan, dtype=dtype)
        x = memory.transpose(-2, -3)
    elif layout == "columns apart":
        memory = torch.full((*shape, 2), torch.nan, dtype=dtype)
        x = memory[..., 1]
    elif layout == "padded columns":
        memory = torch.full((*shape[:-1], shape[-1] + 3), torch.nan, dtype=dtype)
        x = memory[..., 1:-2]
    else:
        memory = x = torch.full(shape, torch.nan, dtype=dtype)
    return x.copy_(torch.randn(shape)), memory


@dataclass
class Call:
    dtype: torch.dtype
    table_dtype: torch.dtype | None
    layout: str
    heads: int
    pairs: int
    rest: int
    lengths: list[int]  # packed; else the first is of all, and there are so many
    packed: bool
    offset_kind: str
    index_dtype: torch.dtype
    table_columns_apart: bool
    interleaved: bool
    conjugate: bool
    inplace: bool

    def run(self) -> None:
        batch, longest = len(self.lengths), max(self.lengths, default=0)
        head_dim = 2 * self.pairs + self.rest
        if self.packed:
            total = sum(self.lengths) + 2  # two rows of no sequence
            shape = (total, self.heads, head_dim)
        else:
            longest = self.lengths[0] if self.lengths else 3
            shape = (batch, longest, self.heads, head_dim)
        x, memory = laid_out(shape, self.layout, self.dtype)
        offsets, first = self.offsets(batch)
        rows = longest + (5 if self.offset_kind == "number" else 2)
        cos, sin = angles(rows, self.pairs, self.table_dtype or self.dtype)
        if self.table_columns_apart:
            cos, sin = (torch.stack([t, t * torch.nan], -1)[..., 0] for t in (cos, sin))
        options = dict(
            interleaved=self.interleaved, conjugate=self.conjugate, seqlen_offsets=offsets
        )
        if self.packed:
            ends = torch.tensor([0, *self.lengths]).cumsum(0).to(self.index_dtype)
            options.update(cu_seqlens=ends, max_seqlen=longest)
            steps = [torch.arange(n) + o for n, o in zip(self.lengths, first.tolist())]
            positions = torch.cat([*steps, torch.tensor([-1, -1])]).long()
        else:
            positions = torch.arange(longest) + first[:, None]
        before = memory.clone()
        exact = reference(x, cos, sin, positions, self.interleaved, self.conjugate)
        y = anyflash.rotary(x, cos, sin, inplace=self.inplace, **options)
        assert y.shape == x.shape and y.dtype == x.dtype
        assert_close(y, exact)
        if self.inplace:
            assert y is x
            x.fill_(torch.nan)  # what lies around x
            assert memory.isnan().sum() == before.isnan().sum() + x.numel()
        else:
            assert torch.equal(memory.nan_to_num(7), before.nan_to_num(7))

    def offsets(self, batch: int) -> tuple[int | Tensor, Tensor]:
        """(the argument, the first position of each sequence)"""
        if self.offset_kind == "number":
            return 5, torch.full((batch,), 5)
        first = torch.randint(0, 6, (batch,))
        if self.offset_kind == "far" and batch:
            first[0] = torch.iinfo(torch.int32).max - 100
        if self.offset_kind == "none":
            return 0, torch.zeros(batch, dtype=torch.int64)
        return first.to(self.index_dtype), first


CALLS = st.builds(
    Call,
    dtype=st.sampled_from(DTYPES),
    table_dtype=st.sampled_from([None, torch.float32, torch.bfloat16]),
    layout=st.sampled_from(LAYOUTS),
    heads=st.integers(0, 3),
    pairs=st.one_of(st.integers(0, 40), st.sampled_from([64, 128, 257, 300])),
    rest=st.integers(0, 19),
    lengths=st.lists(st.integers(0, 9), max_size=4),
    packed=st.booleans(),
    offset_kind=st.sampled_from(["none", "number", "tensor", "far"]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    table_columns_apart=st.booleans(),
    interleaved=st.booleans(),
    conjugate=st.booleans(),
    inplace=st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(CALLS, st.integers(0, 1000))
def test_any_call(call, seed):
    torch.manual_seed(seed)
    call.run()


def test_the_result_has_the_same_bits_for_any_number_of_threads(device):
    x, (cos, sin) = torch.randn(3, 700, 4, 64, device=device), angles(700, 32, device=device)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = anyflash.rotary(x, cos, sin)
        torch.set_num_threads(3)
        assert torch.equal(anyflash.rotary(x, cos, sin), one)
        assert torch.equal(anyflash.rotary(x, cos, sin, inplace=True), one)
    finally:
        torch.set_num_threads(threads)


def test_math_is_the_same(device):
    x, (cos, sin) = torch.randn(2, 9, 4, 16, device=device), angles(9, 6, device=device)
    with anyflash.backend("math"):
        expected = anyflash.rotary(x, cos, sin, interleaved=True)
    torch.testing.assert_close(anyflash.rotary(x, cos, sin, interleaved=True), expected)


# ---- Derivatives.


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [1, torch.tensor([2, 4])])
def test_first_and_second_derivative(device, interleaved, offsets):
    x, cos, sin = sample(heads=1, dtype=torch.float64, device=device)
    cos, sin = cos.requires_grad_(), sin.requires_grad_()
    offsets = offsets if isinstance(offsets, int) else offsets.to(device)
    options = dict(interleaved=interleaved, seqlen_offsets=offsets)

    def function(x, cos, sin):
        return anyflash.rotary(x, cos, sin, **options)

    torch.autograd.gradcheck(function, (x, cos, sin))
    torch.autograd.gradgradcheck(function, (x, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_derivative_in_the_dtypes_of_the_kernel(device, dtype):
    x, cos, sin = sample(dtype=dtype, device=device)
    y = anyflash.rotary(x, cos, sin, interleaved=True, seqlen_offsets=2)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    positions = torch.arange(2, 7).expand(2, 5)
    cos, sin, dy = cos.cpu(), sin.cpu(), dy.cpu()
    assert_close(dx, reference(dy, cos, sin, positions, interleaved=True, conjugate=True))


def test_second_derivative_through_the_operator(device):
    results = []
    for function in (lambda x, c, s: anyflash.rotary(x, c, s), lambda x, c, s: FORMULA(x, c, s)):
        x, cos, sin = sample(device=device)
        (dx,) = torch.autograd.grad(weighted(function(x, cos[:5], sin[:5])), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(*results)


def test_derivative_of_learned_tables(device):
    results = []
    for function in (anyflash.rotary, FORMULA):
        x, cos, sin = sample(device=device)
        tables = [t[:5].detach().requires_grad_() for t in (cos, sin)]
        results.append(torch.autograd.grad(weighted(function(x, *tables)), (x, *tables)))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)


def _operator(x, cos, sin):
    return torch.ops.anyflash.rotary(x, cos, sin, None, 0, None, 0, False, False)


def _written(x, cos, sin):
    return anyflash.rotary(x * 1, cos, sin, inplace=True)


@pytest.mark.parametrize("function", [anyflash.rotary, _operator, _written])
def test_functorch(device, function):
    x, cos, sin = sample(device=device, requires_grad=False)
    cos, sin = cos[:5], sin[:5]
    for i in range(3):
        tensors = (x, cos, sin)
        found = torch.func.grad(lambda *t: weighted(function(*t)), argnums=i)(*tensors)
        expected = torch.func.grad(lambda *t: weighted(FORMULA(*t)), argnums=i)(*tensors)
        torch.testing.assert_close(found, expected)
    xs = torch.stack([x, -x])
    per_sample = torch.func.vmap(torch.func.grad(lambda x: weighted(anyflash.rotary(x, cos, sin))))
    assert torch.equal(
        per_sample(xs)[0], torch.func.grad(lambda x: weighted(_operator(x, cos, sin)))(x)
    )


def test_forward_mode(device):
    x, cos, sin = sample(device=device, requires_grad=False)
    tangent = torch.randn_like(x)
    y, dy = torch.func.jvp(lambda x: anyflash.rotary(x, cos, sin), (x,), (tangent,))
    torch.testing.assert_close(dy, anyflash.rotary(tangent, cos, sin))


# ---- In place.


def test_in_place_counts_as_a_write(device):
    x, cos, sin = sample(device=device, requires_grad=False)
    before = x._version
    assert anyflash.rotary(x, cos, sin, inplace=True) is x
    assert x._version > before
    before = x._version
    torch.ops.anyflash.rotary_(x, cos, sin, None, 0, None, 0, False, False)
    assert x._version > before


@pytest.mark.parametrize("rotate", [apply_rotary_emb, apply_rotary])
def test_a_value_saved_before_the_write_is_missed(device, rotate):
    x, cos, sin = sample(device=device)
    y = x.exp()  # keeps its result for the backward
    rotate(y, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_place_on_a_leaf_that_requires_a_gradient(device):
    x, cos, sin = sample(device=device)
    with pytest.raises(RuntimeError, match="leaf"):
        anyflash.rotary(x, cos, sin, inplace=True)
    with torch.no_grad():
        anyflash.rotary(x, cos, sin, inplace=True)


def test_in_place_on_a_strided_view_whose_result_is_ignored(device):
    """As esm calls it, and unlike upstream with the right gradient."""
    x, cos, sin = sample(heads=6, device=device)
    ends = torch.tensor([0, 5, 10], dtype=torch.int32, device=device)
    qkv = (x * 1).view(10, 3, 2, 10)
    for i in (0, 1):
        apply_rotary(qkv[:, i], cos, sin, cu_seqlens=ends, max_seqlen=5, inplace=True)
    expected = FORMULA(x, cos[:5], sin[:5]).view(2, 5, 3, 2, 10)
    expected = torch.cat([expected[:, :, :2], x.view(2, 5, 3, 2, 10)[:, :, 2:]], 2).view_as(qkv)
    torch.testing.assert_close(qkv, expected)
    gradients = [torch.autograd.grad(weighted(y), x)[0] for y in (qkv, expected)]
    torch.testing.assert_close(*gradients)


def test_rows_that_share_elements(device):
    """A sliding window: no angle, no change, and the fake's strides are the result's."""
    x = torch.randn(2, 3, 10, device=device).unfold(-1, 8, 1)
    cos, sin = torch.ones(3, 4, device=device), torch.zeros(3, 4, device=device)
    y = anyflash.rotary(x, cos, sin)
    assert torch.equal(y, x)
    assert anyflash.rotary(x.to("meta"), cos.to("meta"), sin.to("meta")).stride() == y.stride()
