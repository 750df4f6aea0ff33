"""GPT: decoder-only language models, and the checkpoints they load.

A configuration is any object with the attributes of transformers' GPT2Config. Attributes beyond
those, all optional, choose the variants:

    head_dim, n_head_kv, qkv_proj_bias, out_proj_bias, attn_dwconv, window_size, use_alibi,
    rotary_emb_fraction, rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved,
    mlp_fc1_bias, mlp_fc2_bias, mlp_multiple_of, mlp_checkpoint_lvl (a number, or one per layer),
    rms_norm, prenorm, parallel_block, parallel_block_tied_norm, residual_in_fp32,
    word_embed_proj_dim, pad_vocab_size_multiple, tie_word_embeddings, lm_head_bias, norm_head,
    mup_width_scale, mup_embeddings_multiplier, mup_output_multiplier, mup_attn_multiplier,
    mup_scale_qk_dot_by_d,
    use_flash_attn, fused_bias_fc, fused_mlp, fused_dense_sqrelu_dense, fused_dropout_add_ln,
    sequence_parallel.
"""

# ruff: noqa: F401  (clients import the names of the layers from here)
from __future__ import annotations

import logging
from collections import namedtuple
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flash_attn.models import _remap
from flash_attn.models._gpt_checkpoints import remap_state_dict_hf_gpt2, remap_state_dict_megatron
from flash_attn.models._gpt_layers import (
    _init_weights,
    create_block,
    create_mixer_cls,
    create_mlp_cls,
    initialize,
    norm_cls,
    parallel_kwargs,
)
from flash_attn.models._shards import combine_state_dicts_tp, shard_state_dict_tp
from flash_attn.models.bigcode import remap_state_dict_hf_bigcode
from flash_attn.models.falcon import remap_state_dict_hf_falcon
from flash_attn.models.gpt_neox import remap_state_dict_hf_gpt_neox
from flash_attn.models.gptj import remap_state_dict_hf_gptj
from flash_attn.models.llama import remap_state_dict_hf_llama
from flash_attn.models.opt import remap_state_dict_hf_opt
from flash_attn.modules.block import Block, ParallelBlock
from flash_attn.modules.embedding import GPT2Embeddings, ParallelGPT2Embeddings
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
from flash_attn.ops.fused_dense import ColumnParallelLinear, fused_dense_func
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn
from flash_attn.ops.triton.mlp import FusedDenseSqreluDense
from flash_attn.utils.distributed import (
    all_gather,
    all_gather_raw,
    get_dim_for_local_rank,
    sync_shared_params,
)
from flash_attn.utils.generation import GenerationMixin
from flash_attn.utils.pretrained import state_dict_from_pretrained

logger = logging.getLogger(__name__)

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])

# Whose state dicts from_pretrained converts how, by the start of the model's name.
_REMAPS = {
    "gpt2": remap_state_dict_hf_gpt2,
    "facebook/opt": remap_state_dict_hf_opt,
    "EleutherAI/gpt-j-": remap_state_dict_hf_gptj,
    "togethercomputer/GPT-JT-": remap_state_dict_hf_gptj,
    "EleutherAI/gpt-neox-": remap_state_dict_hf_gpt_neox,
    "EleutherAI/pythia-": remap_state_dict_hf_gpt_neox,
    "togethercomputer/RedPajama-INCITE-": remap_state_dict_hf_gpt_neox,
    "tiiuae/falcon-": remap_state_dict_hf_falcon,
    "meta-llama/Llama-": remap_state_dict_hf_llama,
    "bigcode/": remap_state_dict_hf_bigcode,
    "WizardLM/": remap_state_dict_hf_bigcode,
}


class GPTPreTrainedModel(nn.Module):
    """A model that keeps its configuration and loads published checkpoints."""

    process_group: Any = None

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        super().__init__()
        self.config = config

    def tie_weights(self) -> None:
        """Makes the processes of the group agree on the weights that each of them has whole."""
        if self.process_group is not None:
            sync_shared_params(self, self.process_group)

    @classmethod
    def from_pretrained(
        cls,
        model_name: str,
        config: Any,
        *args: Any,
        strict: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        world_size: int = 1,
        rank: int = 0,
        **kwargs: Any,
    ) -> GPTPreTrainedModel:
        """A model with the weights of a folder or of the Hugging Face hub.

        Args:
            model_name: see state_dict_from_pretrained; its start tells the format of the weights.
            config: of the model to make, see for example llama_config_to_gpt2_config.
            world_size, rank: take this rank's part of tensor parallel weights.

        Raises:
            NotImplementedError: a name that doesn't tell a known format.
        """
        remap = next((r for start, r in _REMAPS.items() if model_name.startswith(start)), None)
        if remap is None:
            known = ", ".join(_REMAPS)
            raise NotImplementedError(
                f"Model {model_name} not supported: expected a name that starts with one of {known}"
            )
        model = cls(config, *args, device=device, dtype=dtype, **kwargs)
        state_dict = remap(
            state_dict_from_pretrained(model_name, device="cpu", dtype=dtype), config
        )
        if world_size > 1:
            state_dict = shard_state_dict_tp(state_dict, config, world_size, rank)
        logger.info(model.load_state_dict(state_dict, strict=strict))
        return model


class GPTModel(GPTPreTrainedModel):
    """Embeddings, layers and the final norm.

    The layers compute dropout, add, norm, attention or MLP, in this order, and hand on hidden
    states and residual, so that dropout, add and norm can be one operation. The function is that of
    the usual order with the dropouts moved: the first layer has that of the embeddings, and the
    final norm that of the last layer.
    """

    def __init__(
        self,
        config: Any,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config)
        factory_kwargs = {"device": device, "dtype": dtype}
        self.process_group = process_group
        self.sequence_parallel = getattr(config, "sequence_parallel", True)
        self.embeddings_multiplier = getattr(config, "mup_embeddings_multiplier", 1.0)
        self.residual_in_fp32 = getattr(config, "residual_in_fp32", False)
        self.prenorm = getattr(config, "prenorm", True)
        self.parallel_block = getattr(config, "parallel_block", False)
        self.fused_dropout_add_ln = getattr(config, "fused_dropout_add_ln", False)

        width = getattr(config, "word_embed_proj_dim", None)
        if process_group is None:
            embeddings_cls: Callable[..., nn.Module] = partial(
                GPT2Embeddings, word_embed_proj_dim=width
            )
        elif width is not None:
            raise ValueError(
                f"word_embed_proj_dim: expected None with tensor parallelism, got {width}"
            )
        else:
            embeddings_cls = partial(
                ParallelGPT2Embeddings, **parallel_kwargs(config, process_group)
            )
        self.embeddings = embeddings_cls(
            config.hidden_size,
            _remap.padded_vocab_size(config),
            config.max_position_embeddings,
            **factory_kwargs,
        )
        self.layers = nn.ModuleList(
            create_block(config, layer_idx=i, process_group=process_group, **factory_kwargs)
            for i in range(config.num_hidden_layers)
        )
        if getattr(config, "rotary_emb_fraction", 0.0) > 0.0:
            first: Any = self.layers[0]
            layer: Any
            for layer in self.layers[1:]:  # all share the tables of the first
                layer.mixer.rotary_emb = first.mixer.rotary_emb
        if self.prenorm:
            self.drop_f = nn.Dropout(config.resid_pdrop)
            self.ln_f: Any = norm_cls(config, **factory_kwargs)(config.hidden_size)
            if process_group is not None:
                parameter: Any
                for parameter in self.ln_f.parameters():
                    parameter._shared_params = True
                    if self.sequence_parallel:
                        parameter._sequence_parallel = True
        initialize(self, config)
        self.tie_weights()

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The key and value caches by the numbers of the layers."""
        size = (batch_size, max_seqlen, dtype)
        layers: Any = self.layers
        return dict(enumerate(x.allocate_inference_cache(*size, **kwargs) for x in layers))

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, inference_params: Any = None
    ) -> Tensor:
        """(batch, seqlen) ids to (batch, seqlen, hidden_size).

        Sequence parallel: to this rank's rows of (batch * seqlen, hidden_size).
        """
        embedding_kwargs, mixer_kwargs = {}, {}
        if self.process_group is not None and self.sequence_parallel:
            embedding_kwargs = {"combine_batch_seqlen_dim": True}
            mixer_kwargs = {"seqlen": input_ids.shape[1]}
        if inference_params is not None:
            mixer_kwargs["inference_params"] = inference_params
        hidden_states = self.embeddings(input_ids, position_ids=position_ids, **embedding_kwargs)
        if self.embeddings_multiplier != 1.0:
            hidden_states = hidden_states * self.embeddings_multiplier
        if not self.prenorm:
            for layer in self.layers:
                hidden_states = layer(hidden_states, mixer_kwargs=mixer_kwargs)
            return hidden_states
        # What awaits the next addition: the outputs of attention and MLP in a parallel block.
        branches: list[Tensor | None] = [hidden_states]
        if self.parallel_block:
            branches.append(None)
        residual = None
        for layer in self.layers:
            *branches, residual = layer(*branches, residual, mixer_kwargs=mixer_kwargs)
        return self._final_norm(branches, residual)

    def _final_norm(self, branches: Sequence[Any], residual: Tensor | None) -> Tensor:
        if not self.fused_dropout_add_ln:
            dropped = [self.drop_f(branch) for branch in branches if branch is not None]
            total = dropped[0] if residual is None else residual + dropped[0]
            for branch in dropped[1:]:
                total = total + branch
            return self.ln_f(total.to(dtype=self.ln_f.weight.dtype))
        return layer_norm_fn(
            branches[0],
            self.ln_f.weight,
            self.ln_f.bias,
            residual=residual,
            x1=branches[1] if self.parallel_block else None,
            eps=self.ln_f.eps,
            dropout_p=self.drop_f.p if self.training else 0.0,
            prenorm=False,
            is_rms_norm=isinstance(self.ln_f, RMSNorm),
        )


class GPTLMHeadModel(GPTPreTrainedModel, GenerationMixin):
    """GPTModel and the head that predicts the next token."""

    def __init__(
        self,
        config: Any,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config)
        factory_kwargs = {"device": device, "dtype": dtype}
        self.process_group = process_group
        self.transformer = GPTModel(config, process_group=process_group, **factory_kwargs)
        self.tie_word_embeddings = getattr(config, "tie_word_embeddings", True)
        hidden_size, width = config.hidden_size, getattr(config, "word_embed_proj_dim", None)
        self.project_out = (
            None if width is None else nn.Linear(hidden_size, width, bias=False, **factory_kwargs)
        )
        self.output_scale = getattr(config, "mup_output_multiplier", 1.0) * getattr(
            config, "mup_width_scale", 1.0
        )
        linear_cls = nn.Linear if process_group is None else ColumnParallelLinear
        self.lm_head: Any = linear_cls(
            hidden_size if width is None else width,
            _remap.padded_vocab_size(config),
            bias=getattr(config, "lm_head_bias", False),
            **parallel_kwargs(config, process_group),
            **factory_kwargs,
        )
        self.norm_head = getattr(config, "norm_head", False)
        initialize(self, config)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Also makes the head's weights the word embeddings', if the configuration asks for it."""
        words: Any = self.transformer.embeddings.word_embeddings
        if self.tie_word_embeddings:
            self.lm_head.weight = words.weight
        super().tie_weights()

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """As GPTModel."""
        return self.transformer.allocate_inference_cache(batch_size, max_seqlen, dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
    ) -> CausalLMOutput:
        """Logits (batch, seqlen, padded vocabulary) in a tuple with that name.

        Args:
            input_ids: (batch, seqlen).
            position_ids: (batch, seqlen), or None for 0, 1, 2, ...
            inference_params: InferenceParams, with the caches that keys and values are kept in.
            num_last_tokens: only compute the logits of so many last tokens; 0 for all.

        Tensor parallel: each rank has its part of the vocabulary, except with inference_params.
        """
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids: expected (batch, seqlen), got {tuple(input_ids.shape)}")
        hidden_states = self.transformer(
            input_ids, position_ids=position_ids, inference_params=inference_params
        )
        if (inference_params is not None or num_last_tokens > 0) and hidden_states.ndim != 3:
            raise ValueError(
                "inference_params, num_last_tokens: expected None and 0 with sequence_parallel"
            )
        logits = self._head(hidden_states, num_last_tokens)
        if inference_params is not None and self.process_group is not None:
            logits, _ = all_gather_raw(logits, self.process_group)
            logits = rearrange(logits, "(n b) ... d -> b ... (n d)", b=input_ids.shape[0])
        return CausalLMOutput(logits=logits)

    def _head(self, hidden_states: Tensor, num_last_tokens: int) -> Tensor:
        """This rank's logits of the last tokens; 0: of all."""
        features = hidden_states[:, -max(0, num_last_tokens) :]  # -0: from the first on
        if self.project_out is not None:
            features = self.project_out(features)
        scaled = features if self.output_scale == 1.0 else features * self.output_scale
        return self._norm_head(scaled) if self.norm_head else self.lm_head(scaled)

    def _norm_head(self, features: Tensor) -> Tensor:
        """lm_head with rows of length 1."""
        weight = F.normalize(self.lm_head.weight)
        if self.process_group is None:
            return F.linear(features, weight, self.lm_head.bias)
        return fused_dense_func(
            features,
            weight,
            self.lm_head.bias,
            process_group=self.process_group,
            sequence_parallel=self.lm_head.sequence_parallel,
        )

    def load_state_dict(  # type: ignore[override]  # upstream's signature
        self, state_dict: dict[str, Tensor], strict: bool = True
    ) -> Any:
        """Load, also checkpoints of before the norms moved to the start of the layers."""
        if "transformer.ln_0.weight" in state_dict:
            state_dict = _remap.rename(state_dict, _moved_norms(len(self.transformer.layers)))
        return super().load_state_dict(state_dict, strict=strict)


def _moved_norms(n_layer: int) -> dict[str, str]:
    """The old norms, the first before all layers and two at the end of each, to where they act."""
    old = ["transformer.ln_0"]
    new = []
    for layer in range(n_layer):
        norms = [name.replace("#", str(layer)) for name in (_remap.NORM1, _remap.NORM2)]
        old += norms
        new += norms
    return dict(zip(old, [*new, _remap.FINAL_NORM]))
