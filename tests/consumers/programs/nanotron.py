"""nanotron's calls: RMS norm with a residual, rotary, packed keys and values, decode."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    compare,
    cumulative,
    leaves,
    packed_attention,
    plain_attention,
    plain_rotary,
    rotary_tables,
)


@pytest.mark.shows("imported")
def test_imports():
    import flash_attn.bert_padding  # noqa: F401
    from flash_attn.flash_attn_interface import (  # noqa: F401
        _flash_attn_varlen_backward,
        _flash_attn_varlen_forward,
        flash_attn_func,
        flash_attn_varlen_func,
        flash_attn_with_kvcache,
    )
    from flash_attn.layers.rotary import RotaryEmbedding  # noqa: F401
    from flash_attn.modules.mha import flash_attn_varlen_kvpacked_func  # noqa: F401


@pytest.mark.shows("forward", "backward")
@pytest.mark.parametrize("prenorm", [False, True])
def test_rms_norm(prenorm):
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    x, residual, weight = leaves((2, 7, 32), (2, 7, 32), (32,))
    found = layer_norm_fn(
        x, weight, None, residual=residual, eps=1e-6, dropout_p=0.0, prenorm=prenorm,
        residual_in_fp32=False, is_rms_norm=True, return_dropout_mask=False,
    )  # fmt: skip
    total = x + residual
    wanted = torch.nn.functional.rms_norm(total, (32,), weight, 1e-6)
    found, wanted = (found, (wanted, total)) if prenorm else ((found,), (wanted,))
    compare(list(found), list(wanted))
    grads = [torch.autograd.grad(sum(o.sin().sum() for o in out), (x, residual, weight))
             for out in (found, wanted)]  # fmt: skip
    compare(*grads)


@pytest.mark.shows("forward", "backward")
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved):
    from flash_attn.layers.rotary import apply_rotary_emb

    (x,) = leaves((2, 7, 3, 16))
    tables = rotary_tables(9, 16)
    found = apply_rotary_emb(x, *tables, interleaved=interleaved, inplace=False)
    wanted = plain_rotary(x, *tables, interleaved)
    compare(found, wanted)
    compare(*(torch.autograd.grad(o.sin().sum(), x) for o in (found, wanted)))


@pytest.mark.shows("forward", "backward")
def test_packed_keys_and_values():
    from flash_attn.modules.mha import flash_attn_varlen_kvpacked_func

    lengths = [4, 7]
    q, kv = leaves((11, 4, 16), (11, 2, 2, 16))
    cu = cumulative(lengths)
    found = flash_attn_varlen_kvpacked_func(q, kv, cu, cu, 7, 7, 0.0, causal=True)
    wanted = packed_attention(q, *kv.unbind(1), lengths, causal=True)
    compare(found, wanted)
    compare(*(torch.autograd.grad(o.sin().sum(), (q, kv)) for o in (found, wanted)))


@pytest.mark.shows("forward")
def test_decode():
    """Keys and values are appended at each sequence's own length."""
    from flash_attn import flash_attn_with_kvcache

    q, k, v, caches = (x.detach() for x in leaves(*[(2, 1, 2, 16)] * 3, (2, 2, 9, 2, 16)))
    lengths = torch.tensor([3, 6], dtype=torch.int32)
    before = caches.clone()
    found = flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, causal=True)
    for row, length in enumerate(lengths.tolist()):
        keys, values = (
            torch.cat([cache[row, :length], new[row]])[None] for cache, new in zip(before, (k, v))
        )
        compare(found[row : row + 1], plain_attention(q[row : row + 1], keys, values))
        compare(caches[0, row, length], k[row, 0])
