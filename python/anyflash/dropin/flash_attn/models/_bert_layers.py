"""The encoder of BERT from its configuration, and its initialisation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from flash_attn.bert_padding import index_first_axis_residual, pad_input, unpad_input
from flash_attn.modules.block import Block
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import FusedMLP, Mlp

TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")


def approximate(config: Any) -> str:
    """What F.gelu takes for config.hidden_act."""
    allowed = ("gelu", *TANH_GELU)
    if config.hidden_act not in allowed:
        raise ValueError(
            f"hidden_act: expected one of {', '.join(allowed)}, got {config.hidden_act!r}"
        )
    return "none" if config.hidden_act == "gelu" else "tanh"


def create_mixer_cls(
    config: Any, cross_attn: bool = False, return_residual: bool = False
) -> Callable[[int], nn.Module]:
    """What makes the attention of a layer from the hidden size."""
    rotary = {}
    if getattr(config, "position_embedding_type", "absolute") == "rotary":
        rotary = {
            "rotary_emb_dim": getattr(config, "rotary_emb_dim", config.hidden_size),
            "rotary_emb_base": getattr(config, "rotary_emb_base", 10000.0),
            "rotary_emb_scale_base": getattr(config, "rotary_emb_scale_base", None),
            "rotary_emb_interleaved": getattr(config, "rotary_emb_interleaved", False),
        }
    return partial(
        MHA,
        num_heads=config.num_attention_heads,
        cross_attn=cross_attn,
        dropout=config.attention_probs_dropout_prob,
        causal=False,
        fused_bias_fc=getattr(config, "fused_bias_fc", False),
        use_flash_attn=getattr(config, "use_flash_attn", False),
        return_residual=return_residual,
        **rotary,
    )


def create_mlp_cls(
    config: Any, layer_idx: int | None = None, return_residual: bool = False
) -> Callable[[int], nn.Module]:
    """What makes the MLP of a layer from the hidden size."""
    kwargs = {"hidden_features": config.intermediate_size, "return_residual": return_residual}
    gelu = approximate(config)
    if not getattr(config, "fused_mlp", False):
        return partial(Mlp, activation=partial(F.gelu, approximate=gelu), **kwargs)
    if gelu != "tanh":
        raise ValueError(
            f"hidden_act with fused_mlp: expected one of {', '.join(TANH_GELU)}, "
            f"got {config.hidden_act!r}"
        )
    level = getattr(config, "mlp_checkpoint_lvl", 0)
    if isinstance(level, Sequence):
        if layer_idx is None:
            raise ValueError("layer_idx: expected a number for a mlp_checkpoint_lvl per layer")
        level = level[layer_idx]
    return partial(FusedMLP, checkpoint_lvl=level, **kwargs)


def create_block(config: Any, layer_idx: int | None = None) -> Block:
    """One layer; with config.last_layer_subset the last has queries of their own."""
    subset = getattr(config, "last_layer_subset", False)
    cross_attn = subset and layer_idx == config.num_hidden_layers - 1
    # The residual of that layer is the subset, which MHA would not give back: it gives back x_kv.
    return_residual = not cross_attn
    return Block(
        config.hidden_size,
        create_mixer_cls(config, cross_attn, return_residual=return_residual),
        create_mlp_cls(config, layer_idx, return_residual=return_residual),
        norm_cls=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        prenorm=False,
        resid_dropout1=config.hidden_dropout_prob,
        resid_dropout2=config.hidden_dropout_prob,
        fused_dropout_add_ln=getattr(config, "fused_dropout_add_ln", False),
        return_residual=return_residual,
    )


def _init_weights(module: nn.Module, initializer_range: float = 0.02) -> None:
    """transformers' initialisation of a module."""
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        return
    nn.init.normal_(module.weight, std=initializer_range)
    if isinstance(module, nn.Linear):
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif module.padding_idx is not None:
        nn.init.zeros_(module.weight[module.padding_idx])


class BertEncoder(nn.Module):
    """The layers. With config.use_flash_attn and a mask they run on the tokens alone."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.use_flash_attn = getattr(config, "use_flash_attn", False)
        self.layers = nn.ModuleList(
            create_block(config, layer_idx=i) for i in range(config.num_hidden_layers)
        )

    def forward(
        self,
        hidden_states: Tensor,
        key_padding_mask: Tensor | None = None,
        subset_mask: Tensor | None = None,
    ) -> Tensor:
        """(batch, seqlen, hidden_size) to the same shape, or to (tokens, hidden_size).

        Args:
            key_padding_mask: bool (batch, seqlen), False where there is no token.
            subset_mask: bool (batch, seqlen), the tokens to compute the output of; None for all.
        """
        if key_padding_mask is not None and self.use_flash_attn:
            return self._packed(hidden_states, key_padding_mask, subset_mask)
        mixer_kwargs = None
        if key_padding_mask is not None:
            mixer_kwargs = {"key_padding_mask": key_padding_mask}
        for layer in self.layers:
            hidden_states = layer(hidden_states, mixer_kwargs=mixer_kwargs)
        return hidden_states if subset_mask is None else hidden_states[subset_mask]

    def _packed(
        self, hidden_states: Tensor, key_padding_mask: Tensor, subset_mask: Tensor | None
    ) -> Tensor:
        batch, seqlen = hidden_states.shape[:2]
        hidden_states, indices, cu_seqlens, longest, _ = unpad_input(
            hidden_states, key_padding_mask
        )
        kwargs = {"cu_seqlens": cu_seqlens, "max_seqlen": longest}
        kwargs_k = {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": longest}
        whole = self.layers if subset_mask is None else self.layers[:-1]
        layer: Any  # a Block
        for layer in whole:
            own = {**kwargs, **kwargs_k} if layer.mixer.cross_attn else kwargs
            hidden_states = layer(hidden_states, mixer_kwargs=own)
        if subset_mask is None:
            return pad_input(hidden_states, indices, batch, seqlen)
        chosen = subset_mask[key_padding_mask].nonzero().flatten()
        subset, hidden_states = index_first_axis_residual(hidden_states, chosen)
        lengths = (subset_mask & key_padding_mask).sum(dim=-1, dtype=torch.int32)
        kwargs["cu_seqlens"] = F.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))
        # max_seqlen stays: an upper bound is enough, and this one is known.
        last = {**kwargs, **kwargs_k, "x_kv": hidden_states}
        return self.layers[-1](subset, mixer_kwargs=last)
