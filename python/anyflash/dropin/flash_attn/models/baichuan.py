"""Baichuan as a GPTLMHeadModel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flash_attn.models import _remap
from flash_attn.models._remap import FC1, FC2, FINAL_NORM, NORM1, NORM2, OUT_PROJ, WORDS, WQKV

_NAMES = {
    "model.embed_tokens": WORDS,
    "model.norm": FINAL_NORM,
    "model.layers.#.input_layernorm": NORM1,
    "model.layers.#.post_attention_layernorm": NORM2,
    "model.layers.#.self_attn.W_pack": WQKV,
    "model.layers.#.self_attn.o_proj": OUT_PROJ,
    "model.layers.#.self_attn.rotary_emb.inv_freq": None,
    "model.layers.#.mlp.down_proj": FC2,
}
_FC1 = ["model.layers.#.mlp.up_proj", "model.layers.#.mlp.gate_proj"]


def remap_state_dict_hf_baichuan(state_dict: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state dict of Baichuan's own BaichuanForCausalLM for GPTLMHeadModel."""
    state_dict = _remap.rename(state_dict, _NAMES)
    _remap.pad_vocabulary(state_dict, config, tied=config.tie_word_embeddings, sharded=True)
    _remap.convert(state_dict, _remap.layers(config), _FC1, [FC1], _remap.concatenated)
    return state_dict


def baichuan_config_to_gpt2_config(baichuan_config: Any) -> Any:
    """A GPT2Config of a GPTLMHeadModel that computes what the Baichuan model does.

    The configuration doesn't say whether positions are rotary (7B) or ALiBi (13B), nor whether the
    rows of the head are normalised (Baichuan 2): hidden size and vocabulary decide, as upstream.
    """
    rotary = baichuan_config.hidden_size < 5000
    return _remap.gpt2_config(
        vocab_size=baichuan_config.vocab_size,
        n_positions=0,
        n_embd=baichuan_config.hidden_size,
        n_layer=baichuan_config.num_hidden_layers,
        n_head=baichuan_config.num_attention_heads,
        n_inner=baichuan_config.intermediate_size,
        activation_function="swiglu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=baichuan_config.rms_norm_eps,
        rms_norm=True,
        initializer_range=baichuan_config.initializer_range,
        bos_token_id=baichuan_config.bos_token_id,
        eos_token_id=baichuan_config.eos_token_id,
        pad_token_id=baichuan_config.pad_token_id,
        rotary_emb_fraction=1.0 if rotary else 0.0,
        rotary_emb_interleaved=False,
        use_alibi=not rotary,
        use_flash_attn=not rotary,  # the other attention has no ALiBi
        tie_word_embeddings=False,
        norm_head=baichuan_config.vocab_size > 70000,
        qkv_proj_bias=False,
        out_proj_bias=False,
        mlp_fc1_bias=False,
        mlp_fc2_bias=False,
    )
