"""Falcon as a GPTLMHeadModel."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flash_attn.models import _remap
from flash_attn.models._remap import FC1, FC2, NORM1, NORM2, OUT_PROJ, WORDS, WQKV

_NAMES = {
    "transformer.word_embeddings": WORDS,
    "transformer.h.#.input_layernorm": NORM1,
    "transformer.h.#.post_attention_layernorm": NORM2,
    "transformer.h.#.ln_attn": NORM1,
    "transformer.h.#.ln_mlp": NORM2,
    "transformer.h.#.mlp.dense_h_to_4h": FC1,
    "transformer.h.#.mlp.dense_4h_to_h": FC2,
    "transformer.h.#.self_attention.query_key_value": WQKV,
    "transformer.h.#.self_attention.dense": OUT_PROJ,
}


def remap_state_dict_hf_falcon(state_dict: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state dict of transformers' FalconForCausalLM for GPTLMHeadModel."""
    state_dict = _remap.rename(state_dict, _NAMES)
    _remap.pad_vocabulary(state_dict, config, tied=config.tie_word_embeddings)
    n_head, n_head_kv = config.num_attention_heads, getattr(config, "n_head_kv", 1)

    def separate(qkv: Tensor) -> list[Tensor]:
        """Falcon has each key head and value head behind the query heads that use them."""
        groups = rearrange(
            qkv, "(group heads dim) ... -> group heads dim ...",
            group=n_head_kv, heads=n_head // n_head_kv + 2,
        )  # fmt: skip
        q, k, v = groups[:, :-2], groups[:, -2], groups[:, -1]
        return [torch.cat([q.flatten(0, 2), k.flatten(0, 1), v.flatten(0, 1)])]

    _remap.convert(state_dict, _remap.layers(config), [WQKV], [WQKV], separate)
    return state_dict


def falcon_config_to_gpt2_config(falcon_config: Any) -> Any:
    """A GPT2Config of a GPTLMHeadModel that computes what the Falcon model does.

    The names of the first published configurations (n_layer, n_head, n_head_kv) are known, and
    those of transformers.

    Raises:
        ValueError: ALiBi, which Falcon scales unlike everybody else, or scaled rotary embeddings.
    """
    _remap.expect(falcon_config, "alibi", False)
    _remap.expect(falcon_config, "activation", "gelu")
    hidden_size, bias = falcon_config.hidden_size, falcon_config.bias
    n_head_kv = _heads_kv(falcon_config)
    return _remap.gpt2_config(
        vocab_size=falcon_config.vocab_size,
        n_positions=0,
        n_embd=hidden_size,
        n_layer=_either(falcon_config, "n_layer", "num_hidden_layers"),
        n_head=_either(falcon_config, "n_head", "num_attention_heads"),
        n_head_kv=n_head_kv,
        n_inner=getattr(falcon_config, "ffn_hidden_size", None) or 4 * hidden_size,
        activation_function="gelu",
        resid_pdrop=falcon_config.hidden_dropout,
        embd_pdrop=0.0,
        attn_pdrop=falcon_config.attention_dropout,
        layer_norm_epsilon=falcon_config.layer_norm_epsilon,
        initializer_range=falcon_config.initializer_range,
        bos_token_id=falcon_config.bos_token_id,
        eos_token_id=falcon_config.eos_token_id,
        parallel_block=falcon_config.parallel_attn,
        parallel_block_tied_norm=_one_norm(falcon_config, n_head_kv),
        rotary_emb_fraction=1.0,
        rotary_emb_interleaved=False,
        rotary_emb_base=_remap.rope_parameters(falcon_config)["rope_theta"],
        tie_word_embeddings=True,
        qkv_proj_bias=bias,
        out_proj_bias=bias,
        mlp_fc1_bias=bias,
        mlp_fc2_bias=bias,
        lm_head_bias=False,
    )


def _either(config: Any, first: str, second: str) -> Any:
    return getattr(config, first) if hasattr(config, first) else getattr(config, second)


def _heads_kv(config: Any) -> int:
    if hasattr(config, "n_head_kv"):
        return config.n_head_kv
    if getattr(config, "new_decoder_architecture", False):
        return config.num_kv_heads
    if getattr(config, "multi_query", False):
        return 1
    return _either(config, "n_head", "num_attention_heads")


def _one_norm(config: Any, n_head_kv: int) -> bool:
    """Do attention and MLP of a parallel block share their norm?"""
    if not hasattr(config, "new_decoder_architecture"):  # the first configurations don't tell
        return n_head_kv == 1
    norms = getattr(config, "num_ln_in_parallel_attn", None)
    return not config.new_decoder_architecture or norms == 1
