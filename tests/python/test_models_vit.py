"""flash_attn.models.vit against the formulas, and against timm where it is installed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from flash_attn.models.vit import VisionTransformer, init_weights_vit_timm, vit_base_patch16_224
from torch import nn

SIZES = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 5,
}
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def _timm_state_dict(no_embed_class: bool = False) -> dict[str, torch.Tensor]:
    """Random weights under timm's names."""
    shapes = {
        "cls_token": (1, 1, 32),
        "pos_embed": (1, 4 if no_embed_class else 5, 32),
        "patch_embed.proj.weight": (32, 3, 8, 8),
        "patch_embed.proj.bias": (32,),
        "norm.weight": (32,),
        "norm.bias": (32,),
        "head.weight": (5, 32),
        "head.bias": (5,),
    }
    for i in range(3):
        for name, rows, columns in (
            ("attn.qkv", 96, 32),
            ("attn.proj", 32, 32),
            ("mlp.fc1", 128, 32),
            ("mlp.fc2", 32, 128),
        ):
            shapes[f"blocks.{i}.{name}.weight"] = (rows, columns)
            shapes[f"blocks.{i}.{name}.bias"] = (rows,)
        for name in ("norm1", "norm2"):
            shapes[f"blocks.{i}.{name}.weight"] = shapes[f"blocks.{i}.{name}.bias"] = (32,)
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(*s, generator=generator) for name, s in shapes.items()}


def _features(state_dict, images, no_embed_class: bool = False, approximate: str = "none"):
    """Dosovitskiy et al. 2020 in float64."""
    w = {name: tensor.double() for name, tensor in state_dict.items()}

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (32,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    patches = F.conv2d(
        images.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8
    )
    patches = patches.flatten(2).transpose(1, 2)
    cls_token = w["cls_token"].expand(len(images), 1, 32)
    if no_embed_class:
        x = torch.cat([cls_token, patches + w["pos_embed"]], dim=1)
    else:
        x = torch.cat([cls_token, patches], dim=1) + w["pos_embed"]
    for i in range(3):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(-1, (3, 4, 8))
        q, k, v = qkv.transpose(1, 3).unbind(2)
        attention = ((q @ k.transpose(-1, -2)) / 8**0.5).softmax(-1) @ v
        x = x + linear(attention.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        hidden = F.gelu(
            linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"), approximate=approximate
        )
        x = x + linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")


def _close(actual, expected):
    atol = 2e-4 * expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected, rtol=2e-4, atol=atol)


@pytest.mark.providers
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"no_embed_class": True},
        {"use_flash_attn": True},
        {"fused_bias_fc": True},
        {"fused_mlp": True},
        {"fused_dropout_add_ln": True},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_the_formulas(options):
    no_embed_class = options.get("no_embed_class", False)
    state_dict = _timm_state_dict(no_embed_class)
    before = dict(state_dict)
    model = VisionTransformer(**SIZES, **options).eval()
    model.load_state_dict(state_dict)
    assert all(state_dict[name] is before[name] for name in before)
    approximate = "tanh" if options.get("fused_mlp") else "none"
    expected = _features(state_dict, IMAGES, no_embed_class, approximate)
    weight, bias = (state_dict[f"head.{kind}"].double() for kind in ("weight", "bias"))
    _close(model(IMAGES), F.linear(expected[:, 0], weight, bias))
    _close(model.forward_features(IMAGES), expected)
    first = model.forward_features(IMAGES, all_tokens=False)
    assert first.shape == (3, 1, 32)
    _close(first[:, 0], expected[:, 0])
    _close(model.forward_head(first, pre_logits=True), expected[:, 0])


def test_own_state_dict_and_gradients():
    model = VisionTransformer(**SIZES).eval()
    other = VisionTransformer(**SIZES, fused_dropout_add_ln=True, use_flash_attn=True).eval()
    other.load_state_dict(model.state_dict())
    for m in (model, other):
        m(IMAGES).square().sum().backward()
    for (name, parameter), same in zip(model.named_parameters(), other.parameters()):
        atol = 1e-5 * parameter.grad.abs().max().item() + 1e-7
        torch.testing.assert_close(parameter.grad, same.grad, rtol=1e-3, atol=atol, msg=name)


def test_initialisation():
    torch.manual_seed(0)
    model = VisionTransformer(**{**SIZES, "embed_dim": 128, "depth": 2})
    for name, parameter in model.named_parameters():
        if name == "cls_token":
            assert 0 < parameter.abs().max() < 1e-5
        elif name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert abs(parameter.std().item() / 0.02 - 1) < 0.15, name
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    linear = nn.Linear(64, 64)
    init_weights_vit_timm(linear, name="x")
    assert linear.bias.abs().max() == 0 and abs(linear.weight.std().item() / 0.02 - 1) < 0.1


@pytest.mark.parametrize("fused", [False, True])
def test_stochastic_depth(fused):
    """It grows with the depth, acts only in training, and drops whole samples."""
    options = {**SIZES, "drop_path_rate": 0.4, "fused_dropout_add_ln": fused}
    model = VisionTransformer(**options)
    assert [round(b.drop_path1.p, 4) for b in model.blocks] == [0.0, 0.0, 0.2]
    assert [round(b.drop_path2.p, 4) for b in model.blocks] == [0.0, 0.2, 0.4]
    assert model.drop_path.p == pytest.approx(0.4)
    model.drop_path.p = 1.0  # what the last block adds goes, whatever the draw
    for block in model.blocks:
        block.drop_path1.p = block.drop_path2.p = 0.0
    before = model(IMAGES)
    nn.init.normal_(model.blocks[-1].mlp.fc2.weight)
    assert torch.equal(model(IMAGES), before)
    assert not torch.allclose(model.eval()(IMAGES), before)


def test_other_classes_and_no_head():
    norm = partial(nn.LayerNorm, eps=1e-3)
    model = VisionTransformer(
        **{**SIZES, "num_classes": 0}, norm_layer=norm, act_layer=nn.ReLU, qkv_bias=False
    )
    assert model.norm.eps == 1e-3 and isinstance(model.blocks[0].mlp.activation, nn.ReLU)
    assert model(IMAGES).shape == (3, 32)
    assert "blocks.0.mixer.Wqkv.bias" not in model.state_dict()


def test_refused():
    for name, value in (
        ("global_pool", "avg"),
        ("class_token", False),
        ("init_values", 1e-5),
        ("weight_init", "jax"),
        ("fc_norm", True),
        ("pre_norm", True),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected .*, got {value!r}"):
            VisionTransformer(**SIZES, **{name: value})
    with pytest.raises(ValueError, match="pretrained: expected False, got True"):
        vit_base_patch16_224(pretrained=True)


def test_vit_base():
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in VisionTransformer().named_parameters()}
    assert sum(shape.numel() for shape in shapes.values()) == 86_567_656
    assert shapes["blocks.11.mixer.Wkv.weight"] == (1536, 768)


def test_timm():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    options = {**SIZES, "weight_init": ""}
    theirs = timm.models.VisionTransformer(**options).eval()
    torch.manual_seed(0)
    ours = VisionTransformer(**options).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        _close(ours(IMAGES), theirs(IMAGES).double())
