"""diffusers' attention dispatch with its FlashAttention 2 back ends, which have no CUDA gate."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import DTYPES, compare, compare_accelerated

pytest.importorskip("diffusers", minversion="0.36", reason="diffusers is not installed")
from diffusers.models import attention_dispatch  # noqa: E402


def _qkv(requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 24, 4, 16, generator=generator).requires_grad_(requires_grad) for _ in "qkv"
    ]


@pytest.mark.shows("found", "imported")
def test_it_takes_flash_attn():
    assert attention_dispatch._CAN_USE_FLASH_ATTN
    assert attention_dispatch.flash_attn_func.__module__.startswith("flash_attn")


@pytest.mark.shows("forward", "backward")
@pytest.mark.parametrize("backend", ["flash", "flash_varlen"])
@pytest.mark.parametrize("causal", [False, True])
def test_dispatch(monkeypatch, backend, causal):
    monkeypatch.setattr(attention_dispatch, "DIFFUSERS_ENABLE_HUB_KERNELS", False, raising=False)
    q, k, v = _qkv()
    results = []
    for name in (backend, "native"):
        out = attention_dispatch.dispatch_attention_fn(q, k, v, is_causal=causal, backend=name)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for mine, expected in zip(*results):
        compare(mine, expected)


@pytest.mark.shows("forward", "backward")
@pytest.mark.parametrize("dropout_p", [0.0, 1e-30])
def test_operators_of_context_parallelism(dropout_p):
    """They call _wrapped_flash_attn_{forward, backward} with positions alone."""
    q, k, v = _qkv()
    ctx = SimpleNamespace()
    ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
    with torch.no_grad():
        out, lse = attention_dispatch._flash_attention_forward_op(
            ctx, q, k, v, dropout_p=dropout_p, return_lse=True
        )
    assert lse.shape == (2, 24, 4)
    expected = attention_dispatch.dispatch_attention_fn(q, k, v, backend="native")
    compare(out, expected)
    dout = torch.randn_like(out)
    with torch.no_grad():
        gradients = attention_dispatch._flash_attention_backward_op(ctx, dout)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, (q, k, v), dout)):
        compare(mine, theirs)


@pytest.mark.shows("compiled")
@pytest.mark.parametrize("backend", ["flash", "flash_varlen"])
def test_compile(backend):
    """Forward and backward as graphs. Without Inductor, whose C++ takes most of a minute here."""
    q, k, v = _qkv()
    results = []
    for function in (torch.compile(_dispatch, backend="aot_eager"), _dispatch):
        out = function(q, k, v, backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    compare(*results)


def _dispatch(q, k, v, backend):
    return attention_dispatch.dispatch_attention_fn(q * 1.0, k, v, backend=backend)


TRANSFORMER = {
    "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8,
    "num_layers": 2, "sample_size": 16, "patch_size": 2, "norm_type": "ada_norm_zero",
    "num_embeds_ada_norm": 10,
}  # fmt: skip
UNET = {
    "block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 32,
    "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 4, "sample_size": 16,
}  # fmt: skip


@pytest.mark.shows("forward", "backward")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "UNet2DConditionModel"])
def test_models_under_accelerate_sdpa(name, dtype):
    """A step of a denoiser, whose attention is PyTorch's."""
    torch.manual_seed(0)
    config = TRANSFORMER if name.startswith("DiT") else UNET
    model = getattr(pytest.importorskip("diffusers"), name)(**config).to(dtype).eval()
    for parameter in model.parameters():  # some are zero at first, and hide what is before them
        torch.nn.init.normal_(parameter, std=0.05)
    latents = torch.randn(2, 4, 16, 16).to(dtype).requires_grad_()
    words = torch.randn(2, 7, 32).to(dtype)
    more = (
        {"class_labels": torch.tensor([1, 2])}
        if name.startswith("DiT")
        else {"encoder_hidden_states": words}
    )

    def run():
        out = model(latents, timestep=torch.tensor([5, 5]), **more).sample
        return out, *torch.autograd.grad(out.float().square().mean(), latents)

    compare_accelerated(run, dtype, backward=True)
