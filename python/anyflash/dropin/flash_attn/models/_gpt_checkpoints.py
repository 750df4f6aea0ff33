"""State dicts of GPT-2 and Megatron-LM for GPTLMHeadModel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flash_attn.models import _remap
from flash_attn.models._remap import (
    FC1,
    FC2,
    FINAL_NORM,
    NORM1,
    NORM2,
    OUT_PROJ,
    POSITIONS,
    WORDS,
    WQKV,
)

# The state dict of GPT2Model has no prefix, that of GPT2LMHeadModel has "transformer".
_GPT2 = {
    prefix + old: new
    for prefix in ("", "transformer.")
    for old, new in {
        "wte": WORDS,
        "wpe": POSITIONS,
        "ln_f": FINAL_NORM,
        "h.#.ln_1": NORM1,
        "h.#.ln_2": NORM2,
        "h.#.attn.c_attn": WQKV,
        "h.#.attn.c_proj": OUT_PROJ,
        "h.#.attn.bias": None,
        "h.#.attn.masked_bias": None,
        "h.#.mlp.c_fc": FC1,
        "h.#.mlp.c_proj": FC2,
    }.items()
}

_MEGATRON_ROOT = {"language_model.encoder": "transformer", "language_model": "transformer"}
_MEGATRON = {
    "transformer.embedding.word_embeddings": WORDS,
    "wpe": POSITIONS,
    "transformer.final_layernorm": FINAL_NORM,
    "transformer.layers.#.input_layernorm": NORM1,
    "transformer.layers.#.post_attention_layernorm": NORM2,
    "transformer.layers.#.mlp.dense_h_to_4h": FC1,
    "transformer.layers.#.mlp.dense_4h_to_h": FC2,
    "transformer.layers.#.self_attention.query_key_value": WQKV,
    "transformer.layers.#.self_attention.dense": OUT_PROJ,
    "transformer.layers.#.self_attention.rotary_emb": "transformer.layers.#.mixer.rotary_emb",
}


def remap_state_dict_hf_gpt2(state_dict: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state dict of transformers' GPT2Model or GPT2LMHeadModel for GPTLMHeadModel."""
    state_dict = _remap.rename(state_dict, _GPT2)
    _remap.pad_vocabulary(state_dict, config, tied=True)
    for name in (WQKV, OUT_PROJ, FC1, FC2):  # the layers that GPT-2 computes with Conv1D
        _remap.convert(state_dict, _remap.layers(config), [name], [name], _remap.transposed)
    return state_dict


def remap_state_dict_megatron(state_dict: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state dict of a GPT model of Megatron-LM for GPTLMHeadModel."""
    state_dict = _remap.rename(_remap.rename(state_dict, _MEGATRON_ROOT), _MEGATRON)
    _remap.pad_vocabulary(state_dict, config, tied=True, sharded=True)
    _remap.separate_qkv(state_dict, config)
    return state_dict
