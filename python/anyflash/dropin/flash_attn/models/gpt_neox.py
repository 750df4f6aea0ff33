"""GPT-NeoX and Pythia as a GPTLMHeadModel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flash_attn.models import _remap
from flash_attn.models._remap import FC1, FC2, FINAL_NORM, HEAD, NORM1, NORM2, OUT_PROJ, WORDS, WQKV

_NAMES = {
    "gpt_neox.embed_in": WORDS,
    "embed_out": HEAD,
    "gpt_neox.final_layer_norm": FINAL_NORM,
    "gpt_neox.layers.#.input_layernorm": NORM1,
    "gpt_neox.layers.#.post_attention_layernorm": NORM2,
    "gpt_neox.layers.#.mlp.dense_h_to_4h": FC1,
    "gpt_neox.layers.#.mlp.dense_4h_to_h": FC2,
    "gpt_neox.layers.#.attention.query_key_value": WQKV,
    "gpt_neox.layers.#.attention.dense": OUT_PROJ,
    "gpt_neox.layers.#.attention.bias": None,
    "gpt_neox.layers.#.attention.masked_bias": None,
    "gpt_neox.layers.#.attention.rotary_emb.inv_freq": None,
}


def remap_state_dict_hf_gpt_neox(state_dict: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state dict of transformers' GPTNeoXForCausalLM for GPTLMHeadModel."""
    state_dict = _remap.rename(state_dict, _NAMES)
    tied = getattr(config, "tie_word_embeddings", False)
    _remap.pad_vocabulary(state_dict, config, tied=tied)
    _remap.separate_qkv(state_dict, config)
    return state_dict


def gpt_neox_config_to_gpt2_config(gpt_neox_config: Any) -> Any:
    """A GPT2Config of a GPTLMHeadModel that computes what the GPT-NeoX model does.

    Raises:
        ValueError: scaled rotary embeddings.
    """
    rope = _remap.rope_parameters(gpt_neox_config)
    attention_bias = getattr(gpt_neox_config, "attention_bias", True)
    return _remap.gpt2_config(
        vocab_size=gpt_neox_config.vocab_size,
        n_positions=0,
        n_embd=gpt_neox_config.hidden_size,
        n_layer=gpt_neox_config.num_hidden_layers,
        n_head=gpt_neox_config.num_attention_heads,
        n_inner=gpt_neox_config.intermediate_size,
        activation_function=gpt_neox_config.hidden_act,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=gpt_neox_config.layer_norm_eps,
        initializer_range=gpt_neox_config.initializer_range,
        bos_token_id=gpt_neox_config.bos_token_id,
        eos_token_id=gpt_neox_config.eos_token_id,
        prenorm=True,
        parallel_block=gpt_neox_config.use_parallel_residual,
        parallel_block_tied_norm=False,
        rotary_emb_fraction=rope["partial_rotary_factor"],
        rotary_emb_base=rope["rope_theta"],
        tie_word_embeddings=gpt_neox_config.tie_word_embeddings,
        qkv_proj_bias=attention_bias,
        out_proj_bias=attention_bias,
    )
