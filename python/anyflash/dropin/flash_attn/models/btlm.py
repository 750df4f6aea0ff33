"""BTLM (Cerebras) as a GPTLMHeadModel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flash_attn.models import _remap
from flash_attn.models._remap import FC1, FC2, NORM1, NORM2, OUT_PROJ, POSITIONS, WORDS, WQKV

_NAMES = {
    "transformer.wte": WORDS,
    "transformer.wpe": POSITIONS,
    "transformer.relative_pe.slopes": None,
    "transformer.h.#.ln_1": NORM1,
    "transformer.h.#.ln_2": NORM2,
    "transformer.h.#.attn.c_attn": WQKV,
    "transformer.h.#.attn.c_proj": OUT_PROJ,
    "transformer.h.#.mlp.c_proj": FC2,
}
_FC1 = ["transformer.h.#.mlp.c_fc", "transformer.h.#.mlp.c_fc2"]


def remap_state_dict_hf_btlm(state_dict: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state dict of BTLM's own BTLMLMHeadModel for GPTLMHeadModel."""
    state_dict = _remap.rename(state_dict, _NAMES)
    _remap.pad_vocabulary(state_dict, config, tied=True)
    n_layer = _remap.layers(config)
    for name in (WQKV, OUT_PROJ, FC2):
        _remap.convert(state_dict, n_layer, [name], [name], _remap.transposed)
    _remap.convert(
        state_dict,
        n_layer,
        _FC1,
        [FC1],
        lambda value, gate: _remap.concatenated(value.t(), gate.t()),
    )
    return state_dict


def btlm_config_to_gpt2_config(btlm_config: Any) -> Any:
    """A GPT2Config of a GPTLMHeadModel that computes what the BTLM model does."""
    alibi = btlm_config.position_embedding_type == "alibi"
    return _remap.gpt2_config(
        vocab_size=btlm_config.vocab_size,
        n_positions=0 if alibi else btlm_config.n_positions,
        n_embd=btlm_config.hidden_size,
        n_layer=btlm_config.num_hidden_layers,
        n_head=btlm_config.num_attention_heads,
        n_inner=btlm_config.n_inner,
        activation_function=btlm_config.activation_function,
        resid_pdrop=btlm_config.resid_pdrop,
        embd_pdrop=btlm_config.embd_pdrop,
        attn_pdrop=btlm_config.attn_pdrop,
        layer_norm_epsilon=btlm_config.layer_norm_epsilon,
        initializer_range=btlm_config.initializer_range,
        bos_token_id=btlm_config.bos_token_id,
        eos_token_id=btlm_config.eos_token_id,
        use_alibi=alibi,
        use_flash_attn=alibi,  # the other attention has no ALiBi
        mup_width_scale=btlm_config.mup_width_scale,
        mup_embeddings_multiplier=btlm_config.mup_embeddings_scale,
        mup_output_multiplier=btlm_config.mup_output_alpha,
        mup_scale_qk_dot_by_d=btlm_config.mup_scale_qk_dot_by_d,
        mlp_multiple_of=1,
    )
