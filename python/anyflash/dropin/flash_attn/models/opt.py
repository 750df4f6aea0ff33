"""OPT as a GPTLMHeadModel."""

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

# OPT-350m has "decoder" for "model.decoder", OPT-175b "layer_norm" for "final_layer_norm".
_DECODER = {"model.decoder": "decoder"}
_NAMES = {
    "decoder.embed_tokens": WORDS,
    "decoder.embed_positions": POSITIONS,
    "decoder.project_in": "transformer.embeddings.project_in",
    "decoder.project_out": "project_out",
    "decoder.final_layer_norm": FINAL_NORM,
    "decoder.layer_norm": FINAL_NORM,
    "decoder.layers.#.self_attn_layer_norm": NORM1,
    "decoder.layers.#.final_layer_norm": NORM2,
    "decoder.layers.#.fc1": FC1,
    "decoder.layers.#.fc2": FC2,
    "decoder.layers.#.self_attn.out_proj": OUT_PROJ,
}
_QKV = [f"decoder.layers.#.self_attn.{x}_proj" for x in "qkv"]
_PADDING_POSITIONS = 2  # the first rows of OPT's position embeddings, never used


def remap_state_dict_hf_opt(state_dict: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state dict of transformers' OPTForCausalLM for GPTLMHeadModel."""
    state_dict = _remap.rename(_remap.rename(state_dict, _DECODER), _NAMES)
    positions = f"{POSITIONS}.weight"
    state_dict[positions] = state_dict[positions][_PADDING_POSITIONS:]
    _remap.pad_vocabulary(state_dict, config, tied=True)
    _remap.convert(state_dict, _remap.layers(config), _QKV, [WQKV], _remap.concatenated)
    return state_dict


def opt_config_to_gpt2_config(opt_config: Any) -> Any:
    """A GPT2Config of a GPTLMHeadModel that computes what the OPT model does.

    Raises:
        ValueError: layer drop, or norms without weights.
    """
    _remap.expect(opt_config, "layerdrop", 0.0)
    _remap.expect(opt_config, "layer_norm_elementwise_affine", True)
    width, bias = opt_config.word_embed_proj_dim, getattr(opt_config, "enable_bias", True)
    return _remap.gpt2_config(
        vocab_size=opt_config.vocab_size,
        n_positions=opt_config.max_position_embeddings,
        n_embd=opt_config.hidden_size,
        n_layer=opt_config.num_hidden_layers,
        n_head=opt_config.num_attention_heads,
        n_inner=opt_config.ffn_dim,
        activation_function=opt_config.activation_function,
        resid_pdrop=opt_config.dropout,
        embd_pdrop=opt_config.dropout,
        attn_pdrop=opt_config.attention_dropout,
        initializer_range=opt_config.init_std,
        bos_token_id=opt_config.bos_token_id,
        eos_token_id=opt_config.eos_token_id,
        prenorm=opt_config.do_layer_norm_before,
        word_embed_proj_dim=None if width == opt_config.hidden_size else width,
        qkv_proj_bias=bias,
        out_proj_bias=bias,
        mlp_fc1_bias=bias,
        mlp_fc2_bias=bias,
    )
