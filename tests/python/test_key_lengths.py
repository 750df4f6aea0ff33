"""How many keys a sequence has and where they begin: seqused_k alone where it is given."""

from __future__ import annotations

import pytest
import torch
from support import ROUTES, has_attention_kernels

import anyflash
from anyflash.testing import reference

pytestmark = pytest.mark.providers

STARTS, USED = (1, 9, 20, -7), (4, 0, 7)  # rows 1-4, none, 20-26; the last start is not read
CU_Q = (0, 2, 5, 8)


def _ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def _gappy(device, dtype=torch.float64):
    """q, and k and v with NaN in the gaps between sequences."""
    torch.manual_seed(0)
    q = torch.randn(8, 4, 16, dtype=dtype, device=device)
    k, v = (torch.full((28, 2, 16), float("nan"), dtype=dtype, device=device) for _ in "kv")
    for start, used in zip(STARTS, USED):
        k[start : start + used] = torch.randn(used, 2, 16, dtype=dtype, device=device)
        v[start : start + used] = torch.randn(used, 2, 16, dtype=dtype, device=device)
    lengths = {
        "cu_seqlens_q": _ints(CU_Q, device), "cu_seqlens_k": _ints(STARTS, device),
        "seqused_k": _ints(USED, device), "max_seqlen_q": 3, "max_seqlen_k": 7,
    }  # fmt: skip
    return (q, k, v), lengths


def _one_by_one(q, k, v, **options):
    """Each sequence for itself, without anything that needs a length."""
    results = []
    for b, (start, used) in enumerate(zip(STARTS, USED)):
        rows = q[CU_Q[b] : CU_Q[b + 1]].unsqueeze(0)
        keys = (x[start : start + used].unsqueeze(0) for x in (k, v))
        results.append(reference(rows, *keys, **options)[0][0])
    return torch.cat(results)


def _routes(device):
    if device == "cuda":  # its other routes refuse these dtypes
        return (None, "math")
    return [r for r in ROUTES[device] if r != "kernel" or has_attention_kernels(device)]


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (2, 0)}], ids=str)
def test_gaps_between_keys(device, options):
    for route in _routes(device):
        dtype = torch.float32 if route == "kernel" else torch.float64
        (q, k, v), lengths = _gappy(device, dtype)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = anyflash.attention(*leaves, **lengths, **options, backend=route)
        found = torch.autograd.grad(out, leaves, torch.ones_like(out))
        exact = [x.detach().double().requires_grad_() for x in leaves]
        expected = _one_by_one(*exact, **options)
        wanted = torch.autograd.grad(expected, exact, torch.ones_like(expected))
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
        for mine, theirs in zip(found, wanted):
            torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=1e-5)


def test_sequences_may_share_keys_forward(device):
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 2, 16, device=device) for n in (6, 9, 9))
    lengths = {"cu_seqlens_q": _ints((0, 2, 6), device), "seqused_k": _ints((6, 7), device)}
    for route in _routes(device):
        out = anyflash.attention(
            q, k, v, **lengths, cu_seqlens_k=_ints((2, 0, 0), device), max_seqlen_q=4,
            max_seqlen_k=7, backend=route,
        )  # fmt: skip
        for rows, keys in ((slice(0, 2), slice(2, 8)), (slice(2, 6), slice(0, 7))):
            alone = reference(*(x[None] for x in (q[rows], k[keys], v[keys])))[0][0]
            torch.testing.assert_close(out[rows].double(), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("held", [(0, 3, 4), (0, 8, 16), (5, 2, 0)], ids=str)
def test_pages_hold_what_seqused_says(device, held):
    """cu_seqlens_k says nothing about a paged sequence whose length is given."""
    torch.manual_seed(0)
    q = torch.randn(3, 4, 16, device=device)
    k, v = (torch.randn(5, 4, 2, 16, device=device) for _ in "kv")
    table = _ints([[3, 1], [0, 4]], device)
    used = (5, 7)
    for route in _routes(device):
        out = anyflash.attention(
            q, k, v, cu_seqlens_q=_ints((0, 2, 3), device), cu_seqlens_k=_ints(held, device),
            seqused_k=_ints(used, device), block_table=table, max_seqlen_q=2, max_seqlen_k=8,
            backend=route,
        )  # fmt: skip
        for b, rows in enumerate((slice(0, 2), slice(2, 3))):
            keys = (x[table[b].long()].flatten(0, 1)[: used[b]][None] for x in (k, v))
            alone = reference(q[rows][None], *keys)[0][0]
            torch.testing.assert_close(out[rows].double(), alone, atol=1e-5, rtol=1e-5)


_NO_KEYS = {
    "empty pages": ((1, 2, 4, 16), (3, 0, 2, 16), dict(block_table=[[0, 2]], seqused_k=[0])),
    "no pages": ((1, 2, 4, 16), (0, 4, 2, 16), dict(block_table=[[0, 2]], seqused_k=[0])),
    "no table": ((1, 2, 4, 16), (3, 4, 2, 16), dict(block_table=[[]], seqused_k=[0])),
    "no sequences": ((3, 4, 16), (5, 2, 16), dict(cu_seqlens_q=[0], cu_seqlens_k=[0])),
    "no rows of theirs": ((3, 4, 16), (5, 2, 16), dict(cu_seqlens_q=[0, 0], cu_seqlens_k=[0, 5])),
    "no keys of theirs": ((3, 4, 16), (5, 2, 16), dict(cu_seqlens_q=[0, 3], cu_seqlens_k=[0, 0])),
}


@pytest.mark.parametrize("bounds", ["tight", "generous"])
@pytest.mark.parametrize("case", _NO_KEYS)
def test_storage_of_no_keys(device, case, bounds):
    query, key, lengths = _NO_KEYS[case]
    options = {name: _ints(values, device) for name, values in lengths.items()}
    if "cu_seqlens_q" in options:
        longest = {"q": lengths["cu_seqlens_q"][-1], "k": lengths["cu_seqlens_k"][-1]}
        more = 0 if bounds == "tight" else 7
        options.update({f"max_seqlen_{x}": n + more for x, n in longest.items()})
    for route in _routes(device):
        leaves = [torch.randn(n, device=device, requires_grad=True) for n in (query, key, key)]
        out = anyflash.attention(*leaves, **options, backend=route)
        assert out.shape == leaves[0].shape and not out.any(), route
        if "block_table" not in options:
            for gradient in torch.autograd.grad(out.sum(), leaves):
                assert not gradient.any(), route


def test_strides_of_nothing_do_not_matter(device):
    """contiguous() leaves them as they are."""
    q = torch.empty(0, 8, 2, device=device).transpose(1, 2)
    k = torch.empty(1, 0, 2, 16, device=device)[..., ::2]
    none = _ints([0], device)
    for route in _routes(device):
        out = anyflash.attention(q, q, q, cu_seqlens_q=none, cu_seqlens_k=none, backend=route)
        assert out.shape == q.shape, route
        out = anyflash.attention(torch.ones(1, 3, 2, 8, device=device), k, k, backend=route)
        assert not out.any(), route


@pytest.mark.parametrize("name", ["aten_flash", "aten_efficient", "aten_cudnn"])
@pytest.mark.parametrize("rows, keys, starts", [(3, 0, None), (0, 3, None), (3, 3, [0])])
def test_empty_problems_never_reach_the_routines_of_gpus(name, rows, keys, starts):
    """They refuse them, or take a grid of no blocks for an error."""
    from anyflash._python_ops.arguments import AttentionArgs
    from anyflash._python_ops.attention import ROUTES as modules

    q, k = (torch.ones(*(() if starts else (1,)), n, 2, 8) for n in (rows, keys))
    cu_seqlens = None if starts is None else _ints(starts, "cpu")
    args = AttentionArgs(
        q, k, k, cu_seqlens, cu_seqlens, rows, keys, *[None] * 7, 0.0, 1.0, -1, -1, 0.0, True
    )  # fmt: skip
    out, lse = modules[name].forward(args)
    assert not out.any() and not lse.isfinite().any()


def test_padded_storage_of_gappy_keys():
    """What a GPU computes, whose lengths are not read: the gathering of the Python operators."""
    from anyflash._python_ops import padded
    from anyflash._python_ops.arguments import AttentionArgs

    (q, k, v), lengths = _gappy("cpu")
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_k")
    args = AttentionArgs(
        q, k, v, *(lengths[n] for n in names), None, None, None, None, None, None, 0.0, 1.0, -1,
        -1, 0.0, True,
    )  # fmt: skip
    batch = padded.padded_batch(args, None, None)
    assert batch.len_k.tolist() == list(USED)
    for b, (start, used) in enumerate(zip(STARTS, USED)):
        assert torch.equal(batch.k[b, :used], k[start : start + used])
        assert not batch.k[b, used:].any()
    back = torch.zeros_like(k)
    batch.put_keys(back, batch.k)
    assert torch.equal(back, k.nan_to_num(0.0))
