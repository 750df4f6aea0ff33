"""vtx (Evo 2): calls the raw flash_attn_2_cuda, and registers upstream's operator names again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import compare, cumulative, leaves, packed_attention, plain_attention


def on_cpu():
    """The package registers its operators for CUDA alone; here the same for the CPU."""
    from vortex.ops import attn_interface as interface

    for name in ("forward", "varlen_forward", "backward", "varlen_backward"):
        operator = getattr(interface, f"_flash_attn_{name}")
        operator.register_kernel("cpu")(operator._init_fn)
    return interface


vortex = on_cpu()


@pytest.mark.shows("found", "imported")
@pytest.mark.parametrize("first", ["flash_attn", "vortex.ops.attn_interface"])
def test_imports_in_both_orders(first):
    second = {"flash_attn": "vortex.ops.attn_interface"}.get(first, "flash_attn")
    code = (
        f"import {first}, {second}, flash_attn, torch\n"
        "x = torch.randn(1, 5, 2, 8, requires_grad=True)\n"
        "flash_attn.flash_attn_func(x, x, x).sum().backward()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.shows("forward", "backward")
@pytest.mark.parametrize("causal", [False, True])
def test_dense(causal):
    qkv, = leaves((2, 9, 3, 2, 32))  # fmt: skip
    out = vortex.local_flash_attn_qkvpacked_func(qkv, causal=causal)
    wanted = plain_attention(*qkv.unbind(2), causal=causal)
    compare(out, wanted)
    compare(*(torch.autograd.grad(x.sin().sum(), qkv) for x in (out, wanted)))


@pytest.mark.shows("forward", "backward")
def test_packed():
    lengths = [4, 7]
    qkv, = leaves((11, 3, 2, 32))  # fmt: skip
    out = vortex.local_flash_attn_varlen_qkvpacked_func(
        qkv, cumulative(lengths), max(lengths), causal=True
    )
    wanted = packed_attention(*qkv.unbind(1), lengths, causal=True)
    compare(out, wanted)
    compare(*(torch.autograd.grad(x.sin().sum(), qkv) for x in (out, wanted)))


@pytest.mark.shows("forward")
def test_kvcache():
    q, k, v = (x.detach() for x in leaves((2, 1, 2, 32), (2, 16, 2, 32), (2, 16, 2, 32)))
    lengths = torch.tensor([5, 9], dtype=torch.int32)
    out = vortex.local_flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)
    for row, length in enumerate(lengths.tolist()):
        part = slice(row, row + 1)
        compare(out[part], plain_attention(q[part], k[part, :length], v[part, :length]))


@pytest.mark.shows("forward")
def test_rms_norm():
    from stripedhyena.utils import dotdict
    from vortex.model.layers import RMSNorm

    config = {"eps": 1e-5, "hidden_size": 64, "params_dtype": torch.float32}
    fused = RMSNorm(dotdict({**config, "use_flash_rmsnorm": True}))
    plain = RMSNorm(dotdict(config))
    x = torch.randn(3, 5, 64)
    compare(fused(x), plain(x), 1e-3)
