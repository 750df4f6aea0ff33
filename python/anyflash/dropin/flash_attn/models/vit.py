"""Vision transformer (https://arxiv.org/abs/2010.11929), with timm's names and initialisation."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, Callable

import torch
import torch.nn as nn
from einops import rearrange
from torch import Tensor
from torch.nn.init import trunc_normal_

from flash_attn.layers.patch_embed import PatchEmbed
from flash_attn.modules.block import Block, StochasticDepth
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import FusedMLP, Mlp
from flash_attn.ops.triton.layer_norm import layer_norm_fn

ModuleFactory = Callable[..., nn.Module]


def create_mixer_cls(
    num_heads: int,
    qkv_bias: bool,
    attn_drop: float,
    use_flash_attn: bool,
    fused_bias_fc: bool,
    cross_attn: bool = False,
) -> ModuleFactory:
    """What makes the attention of a block from the embedding size."""
    return partial(
        MHA,
        num_heads=num_heads,
        cross_attn=cross_attn,
        qkv_proj_bias=qkv_bias,
        dropout=attn_drop,
        fused_bias_fc=fused_bias_fc,
        use_flash_attn=use_flash_attn,
    )


def create_mlp_cls(
    embed_dim: int, mlp_ratio: float, act_layer: ModuleFactory, fused_mlp: bool
) -> ModuleFactory:
    """What makes the MLP of a block from the embedding size. The fused one is GELU with tanh."""
    hidden_features = int(embed_dim * mlp_ratio)
    if fused_mlp:
        return partial(FusedMLP, hidden_features=hidden_features)
    return partial(Mlp, hidden_features=hidden_features, activation=act_layer())


def create_block(
    embed_dim: int,
    num_heads: int,
    mlp_ratio: float,
    qkv_bias: bool,
    drop_rate: float,
    attn_drop_rate: float,
    drop_path1: float,
    drop_path2: float,
    norm_layer: ModuleFactory,
    act_layer: ModuleFactory,
    use_flash_attn: bool,
    fused_bias_fc: bool,
    fused_mlp: bool,
    fused_dropout_add_ln: bool,
    layer_idx: int | None = None,
    n_layer: int | None = None,
    last_layer_subset: bool = False,
) -> Block:
    """One layer, the last being able to compute a subset of the tokens if last_layer_subset."""
    return Block(
        embed_dim,
        create_mixer_cls(
            num_heads,
            qkv_bias,
            attn_drop_rate,
            use_flash_attn,
            fused_bias_fc,
            cross_attn=last_layer_subset and layer_idx is not None and layer_idx + 1 == n_layer,
        ),
        create_mlp_cls(embed_dim, mlp_ratio, act_layer, fused_mlp),
        norm_cls=norm_layer,
        prenorm=True,
        resid_dropout1=drop_rate,
        resid_dropout2=drop_rate,
        drop_path1=drop_path1,
        drop_path2=drop_path2,
        fused_dropout_add_ln=fused_dropout_add_ln,
        residual_in_fp32=True,
    )


class VisionTransformer(nn.Module):
    """A classifier of images that looks at the class token.

    The blocks compute dropout, add, norm, attention or MLP, in this order, see GPTModel.

    Args:
        img_size, patch_size: in pixels, a number or (height, width).
        in_chans: channels of the image.
        num_classes: outputs of the head; 0 for none.
        mlp_ratio: hidden features of the MLP over embed_dim.
        qkv_bias: whether the projection of queries, keys and values has a bias.
        no_embed_class: position embeddings for the patches only, not for the class token.
        drop_rate, attn_drop_rate: dropout of the residual branches and of the attention.
        drop_path_rate: stochastic depth of the last layer, growing to it from 0 in the first.
        embed_layer, norm_layer, act_layer: other classes than PatchEmbed, LayerNorm and GELU.
        use_flash_attn, fused_bias_fc, fused_mlp, fused_dropout_add_ln: the fused modules.

    Raises:
        ValueError: global_pool, init_values, class_token, pre_norm, fc_norm or weight_init that
            isn't the default; these are there for timm's signature.
    """

    def __init__(
        self,
        img_size: Any = 224,
        patch_size: Any = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        no_embed_class: bool = False,
        pre_norm: bool = False,
        fc_norm: bool | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        embed_layer: ModuleFactory = PatchEmbed,
        norm_layer: ModuleFactory | None = None,
        act_layer: ModuleFactory | None = None,
        use_flash_attn: bool = False,
        fused_bias_fc: bool = False,
        fused_mlp: bool = False,
        fused_dropout_add_ln: bool = False,
    ) -> None:
        super().__init__()
        for name, value, only in (
            ("global_pool", global_pool, "token"),
            ("init_values", init_values, None),
            ("class_token", class_token, True),
            ("pre_norm", pre_norm, False),
            ("fc_norm", fc_norm, None),
            ("weight_init", weight_init, ""),
        ):
            if value != only:
                raise ValueError(f"{name}: expected {only!r}, got {value!r}")
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=1e-6)
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.no_embed_class = no_embed_class
        self.fused_dropout_add_ln = fused_dropout_add_ln

        extra = {"fused_bias_fc": fused_bias_fc} if embed_layer is PatchEmbed else {}
        self.patch_embed = embed_layer(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            bias=True,
            **extra,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        patch_embed: Any = self.patch_embed
        embedded = patch_embed.num_patches + (0 if no_embed_class else self.num_prefix_tokens)
        self.pos_embed = nn.Parameter(torch.randn(1, embedded, embed_dim) * 0.02)

        drop_path = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            create_block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                drop_rate,
                attn_drop_rate,
                drop_path1=drop_path[i - 1] if i > 0 else 0.0,
                drop_path2=drop_path[i],
                norm_layer=norm_layer,
                act_layer=act_layer or nn.GELU,
                use_flash_attn=use_flash_attn,
                fused_bias_fc=fused_bias_fc,
                fused_mlp=fused_mlp,
                fused_dropout_add_ln=fused_dropout_add_ln,
                layer_idx=i,
                n_layer=depth,
                last_layer_subset=True,
            )
            for i in range(depth)
        )
        self.dropout = nn.Dropout(p=drop_rate)
        self.drop_path = StochasticDepth(p=drop_path[-1], mode="row")
        self.norm: Any = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights(weight_init)

    def init_weights(self, mode: str = "") -> None:
        if mode != "":
            raise ValueError(f"mode: expected '', got {mode!r}")
        trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for child in self.children():  # not self, whose init_weights this is
            child.apply(init_weights_vit_timm)

    def _init_weights(self, m: nn.Module) -> None:
        init_weights_vit_timm(m)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The names of the parameters that weight decay leaves alone."""
        return {"pos_embed", "cls_token"}

    def _pos_embed(self, x: Tensor) -> Tensor:
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)
        if self.no_embed_class:
            return torch.cat((cls_token, x + self.pos_embed), dim=1)
        return torch.cat((cls_token, x), dim=1) + self.pos_embed

    def forward_features(self, x: Tensor, all_tokens: bool = True) -> Tensor:
        """Images (batch, in_chans, height, width) to (batch, tokens, embed_dim).

        The tokens are all, or else the class token alone, which saves most of the last block.
        """
        hidden_states, residual = self._pos_embed(self.patch_embed(x)), None
        for block in self.blocks[:-1]:
            hidden_states, residual = block(hidden_states, residual)
        subset = None if all_tokens else slice(0, 1)
        hidden_states, residual = self.blocks[-1](hidden_states, residual, mixer_subset=subset)
        if not self.fused_dropout_add_ln:
            residual = self.drop_path(self.dropout(hidden_states)) + residual
            return self.norm(residual.to(dtype=self.norm.weight.dtype))
        rowscale = None
        if self.drop_path.p > 0 and self.training:
            rowscale = self.drop_path(hidden_states.new_ones(hidden_states.shape[:-1]))
        return layer_norm_fn(
            hidden_states,
            self.norm.weight,
            self.norm.bias,
            residual=residual,
            eps=self.norm.eps,
            dropout_p=self.dropout.p if self.training else 0.0,
            rowscale=rowscale,
            prenorm=False,
        )

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (batch, tokens, embed_dim) to (batch, num_classes), or to the class token."""
        return x[:, 0] if pre_logits else self.head(x[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, in_chans, height, width) to logits (batch, num_classes)."""
        return self.forward_head(self.forward_features(x, all_tokens=False))

    def load_state_dict(  # type: ignore[override]  # upstream's signature
        self, state_dict: dict[str, Tensor], strict: bool = True
    ) -> Any:
        """Load, also timm's checkpoints.

        Those have a convolution for the embedding of patches, and one projection of queries, keys
        and values where the last block here has two.
        """
        renamed = {}
        for key, tensor in state_dict.items():
            key = re.sub(r"^(blocks\.\d+)\.attn\.qkv\.", r"\1.mixer.Wqkv.", key)
            key = re.sub(r"^(blocks\.\d+)\.attn\.proj\.", r"\1.mixer.out_proj.", key)
            renamed[key] = tensor
        patches = renamed.get("patch_embed.proj.weight")
        if patches is not None and patches.dim() == 4:
            renamed["patch_embed.proj.weight"] = rearrange(patches, "o c h w -> o (c h w)")
        last = f"blocks.{len(self.blocks) - 1}.mixer"
        for kind in ("weight", "bias"):
            qkv = renamed.pop(f"{last}.Wqkv.{kind}", None)
            if qkv is not None:
                renamed[f"{last}.Wq.{kind}"] = qkv[: self.embed_dim]
                renamed[f"{last}.Wkv.{kind}"] = qkv[self.embed_dim :]
        return super().load_state_dict(renamed, strict=strict)


def init_weights_vit_timm(module: nn.Module, name: str = "") -> None:
    """timm's initialisation of a module: small weights and no bias for nn.Linear."""
    if not isinstance(module, nn.Linear):
        own_initialisation = getattr(module, "init_weights", None)
        if own_initialisation is not None:
            own_initialisation()
        return
    trunc_normal_(module.weight, std=0.02)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-B/16 for images of 224 x 224, without weights."""
    if pretrained:
        raise ValueError(f"pretrained: expected False, got {pretrained!r}")
    return VisionTransformer(patch_size=16, embed_dim=768, depth=12, num_heads=12, **kwargs)
