"""timm's vision transformers, whose attention is PyTorch's, under anyflash.accelerate_sdpa."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers import DTYPES, compare_accelerated

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
EVA = {**VIT, "use_rot_pos_emb": True}


@pytest.mark.shows("forward", "backward")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, config", [("VisionTransformer", VIT), ("Eva", EVA)])
def test_training(name, config, dtype):
    torch.manual_seed(0)
    modules = {"VisionTransformer": timm.models.vision_transformer, "Eva": timm.models.eva}
    model = getattr(modules[name], name)(**config, num_classes=10).to(dtype).eval()
    images = torch.randn(2, 3, 32, 32).to(dtype).requires_grad_()

    def run():
        out = model(images)
        return out, *torch.autograd.grad(out.float().square().mean(), images)

    compare_accelerated(run, dtype, backward=True)
