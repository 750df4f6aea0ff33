"""stripedhyena (Evo 1): its attention block is flash_attn's MHA, and its model around it."""

from __future__ import annotations

import pytest
import torch
from helpers import compare, compare_training, gradients
from stripedhyena import layers, model, positional_embeddings
from stripedhyena.utils import dotdict

CONFIG = {
    "hidden_size": 64, "num_attention_heads": 4, "num_layers": 2, "num_filters": 64, "eps": 1e-5,
    "params_dtype": torch.float32, "attn_block_dtype": torch.float32, "vocab_size": 32,
    "mlp_dtype": torch.float32, "hyena_block_dtype": torch.float32, "model_parallel_size": 1,
    "attn_layer_idxs": [1], "hyena_layer_idxs": [0], "state_size": 2, "short_filter_length": 3,
    "short_filter_bias": True, "use_flash_attn": True, "inference_mode": False,
    "use_flashfft": False, "tie_embeddings": True, "final_norm": True, "proj_groups": 1,
    "hyena_filter_groups": 1, "max_seqlen": 64,
}  # fmt: skip


def block(**more):
    torch.manual_seed(0)
    return model.AttentionBlock(dotdict({**CONFIG, **more}), layer_idx=1)


@pytest.mark.shows("found", "imported")
def test_imports():
    for name in (model.MHA, positional_embeddings.RotaryEmbedding):
        assert name.__module__.startswith("flash_attn")


@pytest.mark.shows("forward", "backward")
@pytest.mark.parametrize("interpolated", [False, True])
@pytest.mark.parametrize("proj_groups", [1, 2])
def test_attention_block(interpolated, proj_groups):
    """With flash attention and with plain attention; rotary tables stretched or not."""
    options = {"use_interpolated_rotary_pos_emb": interpolated, "proj_groups": proj_groups,
               "rotary_emb_scaling_factor": 2.0 if interpolated else 1.0}  # fmt: skip
    flash, plain = block(**options), block(use_flash_attn=False, **options)
    plain.load_state_dict(flash.state_dict())
    u = torch.randn(2, 9, 64)
    compare_training(flash(u)[0], plain(u)[0], flash, plain, 1e-3)


@pytest.mark.shows("forward")
def test_rms_norm():
    config = dotdict({**CONFIG, "use_flash_rmsnorm": True})
    fused, plain = layers.RMSNorm(config), layers.RMSNorm(dotdict(CONFIG))
    x = torch.randn(3, 5, 64)
    compare(fused(x), plain(x), 1e-3)


@pytest.mark.shows("forward", "backward")
def test_model():
    torch.manual_seed(0)
    made = model.StripedHyena(dotdict(CONFIG))
    logits, _ = made(torch.randint(0, 32, (2, 12)))
    logits.square().mean().backward()
    assert logits.shape == (2, 12, 32)
    assert all(g.isfinite().all() for g in gradients(made).values())
