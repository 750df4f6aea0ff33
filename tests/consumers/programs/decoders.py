"""Decoding as mamba's MHA and Megatron's attention do it: caches and rotary in one call."""

from __future__ import annotations

import pytest
import torch
from helpers import compare, plain_attention, plain_rotary, rotary_tables

HEADS, DIM, SEQLEN = 2, 16, 9


@pytest.mark.shows("imported", "forward")
@pytest.mark.parametrize("interleaved", [False, True])
def test_mamba_mha(interleaved):
    """Token by token, outside no_grad and with trainable weights, against all at once."""
    from flash_attn import flash_attn_with_kvcache
    from flash_attn.layers.rotary import RotaryEmbedding

    torch.manual_seed(0)
    project = torch.nn.Linear(32, 3 * HEADS * DIM)
    rotary = RotaryEmbedding(DIM, base=10000.0, interleaved=interleaved)
    x = torch.randn(1, SEQLEN, 32)
    tables = rotary_tables(SEQLEN, DIM)
    q, k, v = project(x).unflatten(-1, (3, HEADS, DIM)).unbind(2)
    wanted = plain_attention(
        plain_rotary(q, *tables, interleaved), plain_rotary(k, *tables, interleaved), v, causal=True
    )
    cache = torch.zeros(1, SEQLEN, 2, HEADS, DIM)
    rotary._update_cos_sin_cache(SEQLEN, device=x.device, dtype=x.dtype)
    for step in range(SEQLEN):
        new = project(x[:, step : step + 1]).unflatten(-1, (3, HEADS, DIM))
        out = flash_attn_with_kvcache(
            new[:, :, 0], cache[:, :, 0], cache[:, :, 1], new[:, :, 1], new[:, :, 2],
            rotary_cos=rotary._cos_cached, rotary_sin=rotary._sin_cached,
            cache_seqlens=torch.tensor([step], dtype=torch.int32), softmax_scale=None, causal=True,
            rotary_interleaved=rotary.interleaved,
        )  # fmt: skip
        compare(out, wanted[:, step : step + 1])


@pytest.mark.shows("forward")
def test_megatron_flash_decode():
    """Caches lie (seqlen, batch, ...) and are passed permuted."""
    from flash_attn import flash_attn_with_kvcache

    torch.manual_seed(0)
    caches = torch.randn(2, SEQLEN, 3, HEADS, DIM)
    q, k, v = torch.randn(3, 3, 1, HEADS, DIM)
    before, lengths = caches.clone(), [2, 5, 8]
    tables = rotary_tables(SEQLEN, DIM)
    out = flash_attn_with_kvcache(
        q, *(c.permute(1, 0, 2, 3) for c in caches), k, v, rotary_cos=tables[0],
        rotary_sin=tables[1], cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
        rotary_interleaved=False, causal=True,
    )  # fmt: skip
    for row, length in enumerate(lengths):
        here = [t[length : length + 1] for t in tables]
        turned_q, turned_k = (plain_rotary(x[row : row + 1], *here) for x in (q, k))
        keys = torch.cat([before[0, :length, row][None], turned_k], 1)
        values = torch.cat([before[1, :length, row][None], v[row : row + 1]], 1)
        compare(out[row : row + 1], plain_attention(turned_q, keys, values))
        compare(caches[0, length, row], turned_k[0, 0])


@pytest.mark.shows("forward")
def test_megatron_paged_prefill():
    """Pages of 256 and the log-sum-exp, whose layout is (heads, total)."""
    from flash_attn import flash_attn_varlen_func

    torch.manual_seed(0)
    pages = torch.randn(2, 3, 256, HEADS, DIM)
    table = torch.tensor([[2, 0], [1, 0]], dtype=torch.int32)
    lengths_q, lengths_k = [3, 2], [300, 40]
    q = torch.randn(5, HEADS, DIM)
    out, lse, _ = flash_attn_varlen_func(
        q, *pages, torch.tensor([0, 3, 5]).int(), torch.tensor([0, 300, 340]).int(), 3, 300,
        causal=True, return_attn_probs=True, block_table=table,
    )  # fmt: skip
    assert lse.shape == (HEADS, 5)
    for row, part in enumerate(q.split(lengths_q)):
        keys, values = (p[table[row].long()].flatten(0, 1)[: lengths_k[row]][None] for p in pages)
        compare(out.split(lengths_q)[row][None], plain_attention(part[None], keys, values, True))


@pytest.mark.shows("forward", "backward")
@pytest.mark.parametrize("interleaved", [False, True])
def test_megatron_rotary(interleaved):
    from flash_attn.layers.rotary import apply_rotary_emb

    x = torch.randn(2, SEQLEN, HEADS, DIM, requires_grad=True)
    tables = rotary_tables(SEQLEN, 8)
    found = apply_rotary_emb(x, *tables, interleaved)
    wanted = plain_rotary(x, *tables, interleaved)
    compare(found, wanted)
    compare(*(torch.autograd.grad(o.sin().sum(), x) for o in (found, wanted)))
