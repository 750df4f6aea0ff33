"""GPTBigCode (StarCoder) as a GPTLMHeadModel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flash_attn.models import _remap
from flash_attn.models._remap import (
    FC1,
    FC2,
    HEAD,
    NORM1,
    NORM2,
    OUT_PROJ,
    POSITIONS,
    WORDS,
    WQKV,
)

_NAMES = {
    "transformer.wte": WORDS,
    "transformer.wpe": POSITIONS,
    "transformer.h.#.ln_1": NORM1,
    "transformer.h.#.ln_2": NORM2,
    "transformer.h.#.attn.c_attn": WQKV,
    "transformer.h.#.attn.c_proj": OUT_PROJ,
    "transformer.h.#.mlp.c_fc": FC1,
    "transformer.h.#.mlp.c_proj": FC2,
}
_KEPT = (
    "activation_function",
    "attn_pdrop",
    "bos_token_id",
    "embd_pdrop",
    "eos_token_id",
    "initializer_range",
    "layer_norm_epsilon",
    "multi_query",
    "n_embd",
    "n_head",
    "n_inner",
    "n_layer",
    "n_positions",
    "resid_pdrop",
    "scale_attn_weights",
    "use_cache",
    "vocab_size",
)
_KEPT_IF_THERE = (
    "max_batch_size",
    "max_sequence_length",
    "model_type",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
)


def remap_state_dict_hf_bigcode(state_dict: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state dict of transformers' GPTBigCodeForCausalLM for GPTLMHeadModel.

    Every head of the GPTLMHeadModel gets the one key and value head of the multi-query attention.

    Raises:
        ValueError: a model without multi-query attention.
    """
    if not config.multi_query:
        raise ValueError("config.multi_query: expected True, got False")
    state_dict = _remap.rename(state_dict, _NAMES)
    _remap.pad_vocabulary(state_dict, config, tied=True)
    hidden_size, n_head = config.hidden_size, config.num_attention_heads

    def repeated(qkv: Tensor) -> list[Tensor]:
        q, k, v = qkv.split([hidden_size, *[hidden_size // n_head] * 2])
        return _remap.concatenated(q, *[k] * n_head, *[v] * n_head)

    _remap.convert(state_dict, _remap.layers(config), [WQKV], [WQKV], repeated)
    return state_dict


def inv_remap_state_dict_hf_bigcode(
    state_dict: dict[str, Tensor], config: Any
) -> dict[str, Tensor]:
    """The state dict of a GPTLMHeadModel for transformers' GPTBigCodeForCausalLM.

    Its key and value heads are taken to be all the same, as remap_state_dict_hf_bigcode makes them.
    """
    state_dict = _remap.rename(state_dict, _remap.inverse(_NAMES))
    words = _remap.unpad_vocabulary(state_dict["transformer.wte.weight"], config)
    state_dict["transformer.wte.weight"] = state_dict[f"{HEAD}.weight"] = words
    head_dim = config.hidden_size // config.num_attention_heads

    def first_head(qkv: Tensor) -> list[Tensor]:
        q, k, v = qkv.chunk(3)
        return _remap.concatenated(q, k[:head_dim], v[:head_dim])

    packed = ["transformer.h.#.attn.c_attn"]
    _remap.convert(state_dict, _remap.layers(config), packed, packed, first_head)
    return state_dict


def bigcode_config_to_gpt2_config(bigcode_config: Any) -> Any:
    """A GPT2Config of a GPTLMHeadModel that computes what the GPTBigCode model does."""
    present = [name for name in _KEPT_IF_THERE if hasattr(bigcode_config, name)]
    return _remap.gpt2_config(**{n: getattr(bigcode_config, n) for n in (*_KEPT, *present)})
