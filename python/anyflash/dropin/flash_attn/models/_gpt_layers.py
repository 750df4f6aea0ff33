"""The layers of GPTModel from its configuration, and their initialisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from flash_attn.models._shards import GATED
from flash_attn.modules.block import Block, ParallelBlock
from flash_attn.modules.mha import MHA, ParallelMHA
from flash_attn.modules.mlp import (
    FusedMLP,
    GatedMlp,
    Mlp,
    ParallelFusedMLP,
    ParallelGatedMlp,
    ParallelMLP,
)
from flash_attn.ops.activations import sqrelu_fwd
from flash_attn.ops.triton.layer_norm import RMSNorm
from flash_attn.ops.triton.mlp import FusedDenseSqreluDense

_TANH_GELU = ("gelu_new", "gelu_fast", "gelu_approx", "gelu_pytorch_tanh")
_FUSED_ACTIVATIONS = (*_TANH_GELU, "relu", "sqrelu")
_ACTIVATIONS = ("gelu", *_FUSED_ACTIVATIONS, *GATED)
_GATES = {"glu": F.sigmoid, "swiglu": F.silu, "geglu": F.gelu}


def parallel_kwargs(config: Any, process_group: Any) -> dict[str, Any]:
    """What the parallel modules want beyond what the serial ones do."""
    if process_group is None:
        return {}
    sequence_parallel = getattr(config, "sequence_parallel", True)
    return {"process_group": process_group, "sequence_parallel": sequence_parallel}


def _expect_activation(config: Any, allowed: Sequence[str], for_what: str) -> None:
    if config.activation_function not in allowed:
        raise ValueError(
            f"activation_function{for_what}: expected one of {', '.join(allowed)}, "
            f"got {config.activation_function!r}"
        )


def _softmax_scale(config: Any, head_dim: int, layer_idx: int | None) -> float:
    scale = getattr(config, "mup_attn_multiplier", 1.0)
    if config.scale_attn_weights:
        scale *= head_dim ** (-1.0 if getattr(config, "mup_scale_qk_dot_by_d", False) else -0.5)
    if config.scale_attn_by_inverse_layer_idx:
        if layer_idx is None:
            raise ValueError("layer_idx: expected a number for scale_attn_by_inverse_layer_idx")
        scale /= layer_idx + 1
    return scale


def create_mixer_cls(
    config: Any,
    layer_idx: int | None = None,
    process_group: Any = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Callable[[int], nn.Module]:
    """What makes the attention of a layer from the hidden size."""
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    fused_bias_fc = getattr(config, "fused_bias_fc", False)
    dwconv = getattr(config, "attn_dwconv", False)
    if process_group is None:
        mha_cls: type[MHA] | type[ParallelMHA] = MHA
        kwargs = {"fused_bias_fc": fused_bias_fc, "dwconv": dwconv}
    else:
        if dwconv or not fused_bias_fc:
            raise ValueError(
                "config: tensor parallel attention expects fused_bias_fc True and attn_dwconv "
                f"False, got {fused_bias_fc} and {dwconv}"
            )
        mha_cls, kwargs = ParallelMHA, parallel_kwargs(config, process_group)
    return partial(
        mha_cls,
        num_heads=config.num_attention_heads,
        num_heads_kv=getattr(config, "n_head_kv", None),
        qkv_proj_bias=getattr(config, "qkv_proj_bias", True),
        out_proj_bias=getattr(config, "out_proj_bias", True),
        dropout=config.attn_pdrop,
        softmax_scale=_softmax_scale(config, head_dim, layer_idx),
        causal=True,
        layer_idx=layer_idx,
        rotary_emb_dim=int(getattr(config, "rotary_emb_fraction", 0.0) * head_dim),
        rotary_emb_base=getattr(config, "rotary_emb_base", 10000.0),
        rotary_emb_scale_base=getattr(config, "rotary_emb_scale_base", None),
        rotary_emb_interleaved=getattr(config, "rotary_emb_interleaved", False),
        use_alibi=getattr(config, "use_alibi", False),
        window_size=getattr(config, "window_size", (-1, -1)),
        use_flash_attn=getattr(config, "use_flash_attn", False),
        **kwargs,
        device=device,
        dtype=dtype,
    )


def _checkpoint_lvl(config: Any, layer_idx: int | None) -> int:
    level = getattr(config, "mlp_checkpoint_lvl", 0)
    if not isinstance(level, Sequence):
        return level
    if layer_idx is None:
        raise ValueError("layer_idx: expected a number for a mlp_checkpoint_lvl per layer")
    return level[layer_idx]


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name == "relu":
        return partial(F.relu, inplace=True)
    if name == "sqrelu":
        return sqrelu_fwd
    return partial(F.gelu, approximate="tanh" if name in _TANH_GELU else "none")


def create_mlp_cls(
    config: Any,
    layer_idx: int | None = None,
    process_group: Any = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Callable[[int], nn.Module]:
    """What makes the MLP of a layer from the hidden size."""
    name, parallel = config.activation_function, process_group is not None
    fused_mlp = getattr(config, "fused_mlp", False)
    fused_sqrelu = getattr(config, "fused_dense_sqrelu_dense", False)
    kwargs = {"hidden_features": config.n_inner, "device": device, "dtype": dtype}
    if fused_sqrelu:
        _expect_activation(config, ("sqrelu",), " with fused_dense_sqrelu_dense")
        if fused_mlp or parallel:
            raise ValueError(
                "fused_dense_sqrelu_dense: expected without fused_mlp and tensor parallelism"
            )
        level = _checkpoint_lvl(config, layer_idx)
        return partial(FusedDenseSqreluDense, checkpoint_lvl=level, **kwargs)
    kwargs.update(
        bias1=getattr(config, "mlp_fc1_bias", True),
        bias2=getattr(config, "mlp_fc2_bias", True),
        **parallel_kwargs(config, process_group),
    )
    if fused_mlp:
        _expect_activation(config, _FUSED_ACTIVATIONS, " with fused_mlp")
        return partial(
            ParallelFusedMLP if parallel else FusedMLP,
            activation="gelu_approx" if name in _TANH_GELU else name,
            checkpoint_lvl=_checkpoint_lvl(config, layer_idx),
            **kwargs,
        )
    _expect_activation(config, _ACTIVATIONS, "")
    if name in GATED:
        return partial(
            ParallelGatedMlp if parallel else GatedMlp,
            activation=_GATES[name],
            multiple_of=getattr(config, "mlp_multiple_of", 128),
            **kwargs,
        )
    return partial(ParallelMLP if parallel else Mlp, activation=_activation(name), **kwargs)


def norm_cls(config: Any, **factory_kwargs: Any) -> Callable[[int], nn.Module]:
    cls = RMSNorm if getattr(config, "rms_norm", False) else nn.LayerNorm
    return partial(cls, eps=config.layer_norm_epsilon, **factory_kwargs)


def create_block(
    config: Any,
    layer_idx: int | None = None,
    process_group: Any = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """One layer: a Block, or a ParallelBlock if config.parallel_block."""
    factory_kwargs = {"device": device, "dtype": dtype}
    parallel, prenorm = process_group is not None, getattr(config, "prenorm", True)
    if getattr(config, "parallel_block", False):
        if not prenorm:
            raise ValueError("prenorm: expected True with parallel_block, got False")
        block_cls: Callable[..., Any] = partial(
            ParallelBlock, tied_norm=getattr(config, "parallel_block_tied_norm", False)
        )
    else:
        block_cls = partial(Block, prenorm=prenorm)
    block = block_cls(
        config.hidden_size,
        create_mixer_cls(config, layer_idx, process_group=process_group, **factory_kwargs),
        create_mlp_cls(config, layer_idx, process_group=process_group, **factory_kwargs),
        norm_cls=norm_cls(config, **factory_kwargs),
        # The first block's dropout is that of the embeddings, see GPTModel.
        resid_dropout1=config.embd_pdrop if layer_idx == 0 else config.resid_pdrop,
        resid_dropout2=config.resid_pdrop,
        fused_dropout_add_ln=getattr(config, "fused_dropout_add_ln", False),
        residual_in_fp32=getattr(config, "residual_in_fp32", False),
        sequence_parallel=parallel and getattr(config, "sequence_parallel", True),
        mark_shared_params=parallel,
    )
    block.layer_idx = layer_idx
    return block


def _init_residual_outputs(module: nn.Module, std: float) -> None:
    """Draws anew the last projection of the attention or MLP that module is, if it is one."""
    last = {"out_proj.weight", "fc2.weight"}
    for weight in [weight for name, weight in module.named_parameters() if name in last]:
        nn.init.normal_(weight, std=std)


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    mup_width_scale: float = 1.0,
    rescale_prenorm_residual: bool = True,
) -> None:
    """GPT-2's initialisation: what adds to the residual is scaled by 1 / sqrt(2 n_layer)."""
    linear_std = initializer_range * math.sqrt(mup_width_scale)
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        if rescale_prenorm_residual:
            _init_residual_outputs(module, linear_std / math.sqrt(2 * n_layer))
        return
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    else:
        nn.init.normal_(module.weight, std=linear_std)
        # Optimisers for muP read the factor of the learning rate here.
        weight: Any = module.weight
        weight._optim = {**getattr(weight, "_optim", {}), "lr_multiplier": mup_width_scale}
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def initialize(model: nn.Module, config: Any) -> None:
    model.apply(
        partial(
            _init_weights,
            n_layer=config.num_hidden_layers,
            initializer_range=config.initializer_range,
            mup_width_scale=getattr(config, "mup_width_scale", 1.0),
        )
    )
