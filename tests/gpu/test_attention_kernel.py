"""The attention kernel where only a GPU can show it: huge tensors and grids, long caches, streams.

What it computes for ordinary shapes is checked by attention_on_device.cpp and tests/python.
"""

from __future__ import annotations

import pytest
import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

import anyflash


@pytest.fixture(autouse=True)
def kernel_route():
    torch.manual_seed(0)
    with anyflash.backend("kernel"):
        yield


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention in float64 of q, k, v (batch, seqlen, heads, head_dim) with equal heads."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    probabilities = (q @ k.transpose(2, 3) / q.size(-1) ** 0.5).softmax(-1)
    return (probabilities @ v).transpose(1, 2)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


def needs_memory(gigabytes: int) -> None:
    if torch.cuda.get_device_properties(0).total_memory < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of GPU memory")


def test_packed_offsets_beyond_32_bits():
    needs_memory(24)
    heads, head_dim, seqlen = 16, 128, 1024
    sequences = 2**31 // (heads * head_dim * seqlen) + 1
    q, k, v = (randn(sequences * seqlen, heads, head_dim) for _ in range(3))
    ends = torch.arange(sequences + 1, device="cuda", dtype=torch.int32) * seqlen
    out = flash_attn_varlen_func(q, k, v, ends, ends, seqlen, seqlen, causal=True)
    last = [x[-seqlen:].clone()[None] for x in (q, k, v)]
    assert torch.equal(out[-seqlen:], flash_attn_func(*last, causal=True)[0])


def test_dense_offsets_beyond_32_bits():
    needs_memory(24)
    heads, head_dim, seqlen = 8, 64, 128
    batch = 2**31 // (heads * head_dim * seqlen) + 1
    q, k, v = (randn(batch, seqlen, heads, head_dim) for _ in range(3))
    out = flash_attn_func(q, k, v)
    assert torch.equal(out[-1:], flash_attn_func(*(x[-1:].clone() for x in (q, k, v))))


@pytest.mark.parametrize("deterministic", (False, True))
def test_packed_gradients_beyond_32_bits(deterministic):
    needs_memory(70)
    heads, head_dim, seqlen = 16, 128, 1024
    sequences = 2**31 // (heads * head_dim * seqlen) + 1
    q, k, v = (randn(sequences * seqlen, heads, head_dim) for _ in range(3))
    dout = randn(sequences * seqlen, heads, head_dim)
    ends = torch.arange(sequences + 1, device="cuda", dtype=torch.int32) * seqlen
    options = {"causal": True, "deterministic": deterministic}

    def gradients(inputs, dout, attend):
        inputs = [x.clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(attend(*inputs), inputs, dout)

    found = gradients(
        (q, k, v),
        dout,
        lambda *x: flash_attn_varlen_func(*x, ends, ends, seqlen, seqlen, **options),
    )
    last = [x[-seqlen:].clone()[None] for x in (q, k, v, dout)]
    alone = gradients(last[:3], last[3], lambda *x: flash_attn_func(*x, **options))
    for name, of_all, of_last in zip("qkv", found, alone):
        if deterministic or name != "q":
            assert torch.equal(of_all[-seqlen:], of_last[0]), name
        else:  # additions come in any order
            torch.testing.assert_close(of_all[-seqlen:], of_last[0], atol=2e-2, rtol=2e-2)


def test_deterministic_gradients_repeat_bit_by_bit():
    inputs = [randn(2, 1000, heads, 128).requires_grad_() for heads in (8, 2, 2)]
    out = flash_attn_func(*inputs, causal=True, deterministic=True)
    dout = randn(*out.shape)
    first = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    for _ in range(5):
        again = torch.autograd.grad(out, inputs, dout, retain_graph=True)
        assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("seqlen", (1, 3))
def test_more_heads_and_sequences_than_a_grid_has_rows(seqlen):
    q, k, v = (randn(35000, seqlen, 2, 64) for _ in range(3))
    assert relative_error(flash_attn_func(q, k, v), exact(q, k, v)) < 5e-3


@pytest.mark.parametrize("context", (1000, 33333, 131072))
@pytest.mark.parametrize("heads", (2, 16))
def test_decoding_from_a_long_cache(context, heads):
    q, k, v = randn(1, 1, heads, 128), randn(1, context, 2, 128), randn(1, context, 2, 128)
    used = torch.tensor([context], device="cuda", dtype=torch.int32)
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=used)
    group = heads // 2
    expected = exact(q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2))
    assert relative_error(out, expected) < 1e-2


def test_nothing_of_unused_cache_rows_is_seen():
    q, used = randn(3, 1, 8, 128), torch.tensor([700, 1, 4000], device="cuda", dtype=torch.int32)
    k, v = randn(3, 4096, 2, 128), randn(3, 4096, 2, 128)
    expected = flash_attn_with_kvcache(q, k, v, cache_seqlens=used)
    for cache in (k, v):
        for sequence, rows in enumerate(used.tolist()):
            cache[sequence, rows:] = float("nan")
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=used)
    assert torch.equal(out, expected)
    assert out.isfinite().all()


def test_results_repeat_bit_by_bit():
    q, k, v = randn(2, 1, 8, 128), randn(2, 20000, 1, 128), randn(2, 20000, 1, 128)
    used = torch.tensor([20000, 777], device="cuda", dtype=torch.int32)
    first = flash_attn_with_kvcache(q, k, v, cache_seqlens=used)
    for _ in range(5):
        assert torch.equal(flash_attn_with_kvcache(q, k, v, cache_seqlens=used), first)


def test_runs_on_the_current_stream():
    q, k, v = (torch.zeros(2, 512, 8, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # keeps the side stream busy while the kernel is queued
        v.fill_(1.0)
        out = flash_attn_func(q, k, v)
    side.synchronize()
    assert (out == 1).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_input():
    q, k, v = (randn(1, 64, 2, 64).to("cuda:1") for _ in range(3))
    assert relative_error(flash_attn_func(q, k, v), exact(q, k, v)) < 5e-3
