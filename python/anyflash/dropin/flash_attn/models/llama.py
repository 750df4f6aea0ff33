"""Llama, from Meta's checkpoints and from transformers', as a GPTLMHeadModel."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flash_attn.models import _remap
from flash_attn.models._remap import FC1, FC2, FINAL_NORM, HEAD, NORM1, NORM2, OUT_PROJ, WORDS, WQKV
from flash_attn.utils import _optional

_META = {
    "tok_embeddings": WORDS,
    "output": HEAD,
    "norm": FINAL_NORM,
    "rope.freqs": None,
    "layers.#.attention_norm": NORM1,
    "layers.#.ffn_norm": NORM2,
    "layers.#.attention.wo": OUT_PROJ,
    "layers.#.attention.inner_attention.rope.freqs": None,
    "layers.#.feed_forward.w2": FC2,
}
_META_QKV = [f"layers.#.attention.w{x}" for x in "qkv"]
# fc1 has the half that goes through the activation last.
_META_FC1 = ["layers.#.feed_forward.w3", "layers.#.feed_forward.w1"]

_HF = {
    "model.embed_tokens": WORDS,
    "model.norm": FINAL_NORM,
    "model.layers.#.input_layernorm": NORM1,
    "model.layers.#.post_attention_layernorm": NORM2,
    "model.layers.#.self_attn.o_proj": OUT_PROJ,
    "model.layers.#.self_attn.rotary_emb.inv_freq": None,
    "model.layers.#.mlp.down_proj": FC2,
}
_HF_QKV = [f"model.layers.#.self_attn.{x}_proj" for x in "qkv"]
_HF_FC1 = ["model.layers.#.mlp.up_proj", "model.layers.#.mlp.gate_proj"]


def remap_state_dict_meta_llama(state_dict: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state dict of a checkpoint of Meta's, or of one of its shards, for GPTLMHeadModel."""
    state_dict = _remap.rename(state_dict, _META)
    _remap.pad_vocabulary(state_dict, config, tied=config.tie_word_embeddings, sharded=True)
    n_layer = _remap.layers(config)
    _remap.convert(state_dict, n_layer, _META_FC1, [FC1], _remap.concatenated)
    _remap.convert(state_dict, n_layer, _META_QKV, [WQKV], _remap.concatenated)
    return state_dict


def remap_state_dict_hf_llama(state_dict: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state dict of transformers' LlamaForCausalLM for GPTLMHeadModel."""
    state_dict = _remap.rename(state_dict, _HF)
    _remap.pad_vocabulary(state_dict, config, tied=config.tie_word_embeddings, sharded=True)
    n_layer, pairs = _remap.layers(config), _head_dim(config) // 2

    def interleaved(weight: Tensor) -> Tensor:
        """transformers rotates the halves of a head; Meta and GPTLMHeadModel neighbours."""
        return rearrange(weight, "(h two d) ... -> (h d two) ...", d=pairs, two=2)

    _remap.convert(state_dict, n_layer, _HF_FC1, [FC1], _remap.concatenated)
    _remap.convert(
        state_dict,
        n_layer,
        _HF_QKV,
        [WQKV],
        lambda q, k, v: _remap.concatenated(interleaved(q), interleaved(k), v),
    )
    return state_dict


def inv_remap_state_dict_hf_llama(state_dict: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state dict of a GPTLMHeadModel for transformers' LlamaForCausalLM.

    Rows that pad_vocab_size_multiple added go, which is more than upstream's does.
    """
    state_dict = _remap.rename(state_dict, _remap.inverse(_HF))
    words, head = "model.embed_tokens.weight", f"{HEAD}.weight"
    state_dict[words] = _remap.unpad_vocabulary(state_dict[words], config)
    tied = config.tie_word_embeddings
    state_dict[head] = (
        state_dict[words] if tied else _remap.unpad_vocabulary(state_dict[head], config)
    )
    n_layer, head_dim = _remap.layers(config), _head_dim(config)
    rows = [head_dim * n for n in (config.num_attention_heads, *[_remap.heads_kv(config)] * 2)]

    def halves(weight: Tensor) -> Tensor:
        return rearrange(weight, "(h d two) ... -> (h two d) ...", d=head_dim // 2, two=2)

    def unpacked(qkv: Tensor) -> list[Tensor]:
        q, k, v = qkv.split(rows)
        return [halves(q), halves(k), v]

    _remap.convert(state_dict, n_layer, [FC1], _HF_FC1, lambda fc1: fc1.chunk(2))
    _remap.convert(state_dict, n_layer, [WQKV], _HF_QKV, unpacked)
    return state_dict


def _head_dim(config: Any) -> int:
    return config.hidden_size // config.num_attention_heads


def config_from_meta_checkpoint(checkpoint_path: str | os.PathLike, model_name: str) -> Any:
    """The LlamaConfig of transformers for the params.json in checkpoint_path/model_name.

    params.json doesn't give the vocabulary: it is the tokenizer's beside it, or else 32000.
    """
    folder = Path(checkpoint_path) / model_name
    params = json.loads((folder / "params.json").read_text())
    hidden_size, multiple = params["dim"], params.get("multiple_of", 1)
    intermediate = int(8 * hidden_size / 3)
    if params.get("ffn_dim_multiplier") is not None:
        intermediate = int(params["ffn_dim_multiplier"] * intermediate)
    tokenizer, vocab_size = folder / "tokenizer.model", 32000
    if tokenizer.is_file():
        sentencepiece = _optional.load("sentencepiece", f"reading {tokenizer}")
        vocab_size = sentencepiece.SentencePieceProcessor(str(tokenizer)).vocab_size()
    config = _optional.load("transformers", "the configuration of Llama").LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=-(-intermediate // multiple) * multiple,
        num_attention_heads=params["n_heads"],
        num_hidden_layers=params["n_layers"],
        rms_norm_eps=params["norm_eps"],
        num_key_value_heads=params.get("n_kv_heads"),
        vocab_size=vocab_size,
    )
    if "rope_theta" in params:
        config.rotary_emb_base = params["rope_theta"]
    return config


def config_from_hf_checkpoint(checkpoint_path: str | os.PathLike, model_name: str) -> Any:
    """The LlamaConfig of transformers in checkpoint_path/model_name-hf/config.json."""
    llama_config = _optional.load("transformers", "the configuration of Llama").LlamaConfig
    return llama_config.from_pretrained(Path(checkpoint_path) / f"{model_name}-hf" / "config.json")


def config_from_checkpoint(
    checkpoint_path: str | os.PathLike, model_name: str, checkpoint_format: str = "meta"
) -> Any:
    """The LlamaConfig of transformers for a checkpoint in the format "meta" or "hf"."""
    if checkpoint_format == "meta":
        return config_from_meta_checkpoint(checkpoint_path, model_name)
    return config_from_hf_checkpoint(checkpoint_path, model_name)


def state_dicts_from_checkpoint(
    checkpoint_path: str | os.PathLike, model_name: str
) -> list[dict[str, Tensor]]:
    """The shards of a checkpoint of Meta's, in the order of their numbers."""
    return [
        torch.load(path, map_location="cpu", weights_only=True)
        for path in sorted((Path(checkpoint_path) / model_name).glob("consolidated.*.pth"))
    ]


def llama_config_to_gpt2_config(llama_config: Any) -> Any:
    """A GPT2Config of a GPTLMHeadModel that computes what the Llama model does.

    Raises:
        ValueError: an activation, a head_dim or scaled rotary embeddings that it can't compute.
    """
    _remap.expect(llama_config, "hidden_act", "silu")
    heads = llama_config.num_attention_heads
    _remap.expect(llama_config, "head_dim", llama_config.hidden_size // heads, None)
    attention_bias = getattr(llama_config, "attention_bias", False)
    mlp_bias = getattr(llama_config, "mlp_bias", False)
    return _remap.gpt2_config(
        vocab_size=llama_config.vocab_size,
        n_positions=0,
        n_embd=llama_config.hidden_size,
        n_layer=llama_config.num_hidden_layers,
        n_head=heads,
        n_head_kv=llama_config.num_key_value_heads,
        n_inner=llama_config.intermediate_size,
        activation_function="swiglu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=llama_config.rms_norm_eps,
        rms_norm=True,
        initializer_range=llama_config.initializer_range,
        bos_token_id=llama_config.bos_token_id,
        eos_token_id=llama_config.eos_token_id,
        pad_token_id=llama_config.pad_token_id,
        rotary_emb_fraction=1.0,
        rotary_emb_interleaved=True,
        rotary_emb_base=_remap.rope_parameters(llama_config)["rope_theta"],
        tie_word_embeddings=getattr(llama_config, "tie_word_embeddings", False),
        qkv_proj_bias=attention_bias,
        out_proj_bias=attention_bias,
        mlp_fc1_bias=mlp_bias,
        mlp_fc2_bias=mlp_bias,
    )
