"""GPT-J as a GPTLMHeadModel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flash_attn.models import _remap
from flash_attn.models._remap import FC1, FC2, NORM1, OUT_PROJ, WORDS, WQKV

_NAMES = {
    "transformer.wte": WORDS,
    "transformer.h.#.ln_1": NORM1,
    "transformer.h.#.mlp.fc_in": FC1,
    "transformer.h.#.mlp.fc_out": FC2,
    "transformer.h.#.attn.out_proj": OUT_PROJ,
    "transformer.h.#.attn.bias": None,
    "transformer.h.#.attn.masked_bias": None,
}
_QKV = [f"transformer.h.#.attn.{x}_proj" for x in "qkv"]


def remap_state_dict_hf_gptj(state_dict: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state dict of transformers' GPTJForCausalLM for GPTLMHeadModel."""
    state_dict = _remap.rename(state_dict, _NAMES)
    _remap.pad_vocabulary(state_dict, config, tied=config.tie_word_embeddings)
    _remap.convert(state_dict, _remap.layers(config), _QKV, [WQKV], _remap.concatenated)
    return state_dict


def gptj_config_to_gpt2_config(gptj_config: Any) -> Any:
    """A GPT2Config of a GPTLMHeadModel that computes what the GPT-J model does."""
    head_dim = gptj_config.n_embd // gptj_config.n_head
    return _remap.gpt2_config(
        vocab_size=gptj_config.vocab_size,
        n_positions=0,
        n_embd=gptj_config.n_embd,
        n_layer=gptj_config.n_layer,
        n_head=gptj_config.n_head,
        n_inner=gptj_config.n_inner,
        activation_function=gptj_config.activation_function,
        resid_pdrop=gptj_config.resid_pdrop,
        embd_pdrop=gptj_config.embd_pdrop,
        attn_pdrop=gptj_config.attn_pdrop,
        layer_norm_epsilon=gptj_config.layer_norm_epsilon,
        initializer_range=gptj_config.initializer_range,
        bos_token_id=gptj_config.bos_token_id,
        eos_token_id=gptj_config.eos_token_id,
        prenorm=True,
        parallel_block=True,
        parallel_block_tied_norm=True,
        rotary_emb_fraction=gptj_config.rotary_dim / head_dim,
        rotary_emb_interleaved=True,
        tie_word_embeddings=False,
        qkv_proj_bias=False,
        out_proj_bias=False,
        lm_head_bias=True,
    )
