"""State dicts between transformers' BertForPreTraining and ours."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

from torch import Tensor

from flash_attn.models import _remap

_LAYER = "bert.encoder.layers.#"
_NAMES = {
    "bert.embeddings.LayerNorm": "bert.emb_ln",
    "bert.encoder.layer.#.attention.output.LayerNorm": f"{_LAYER}.norm1",
    "bert.encoder.layer.#.output.LayerNorm": f"{_LAYER}.norm2",
    "bert.encoder.layer.#.intermediate.dense": f"{_LAYER}.mlp.fc1",
    "bert.encoder.layer.#.output.dense": f"{_LAYER}.mlp.fc2",
    "bert.encoder.layer.#.attention.output.dense": f"{_LAYER}.mixer.out_proj",
    "cls.predictions.transform.LayerNorm": "cls.predictions.transform.layer_norm",
    "cls.predictions.bias": "cls.predictions.decoder.bias",
}
_QKV = [f"bert.encoder.layer.#.attention.self.{x}" for x in ("query", "key", "value")]

# The rows of the vocabulary, and what those that pad it are filled with: no token is predicted
# that does not exist.
_VOCABULARY = {
    "bert.embeddings.word_embeddings.weight": 0.0,
    "cls.predictions.decoder.weight": 0.0,
    "cls.predictions.decoder.bias": -100.0,
}


def _packed_names(config: Any, layer: int) -> list[str]:
    """The projections of queries, keys and values that our layer has."""
    last = layer == config.num_hidden_layers - 1
    names = ["Wq", "Wkv"] if getattr(config, "last_layer_subset", False) and last else ["Wqkv"]
    return [f"bert.encoder.layers.{layer}.mixer.{name}" for name in names]


def _repack(state_dict: dict[str, Tensor], config: Any, *, unpack: bool) -> None:
    for layer in range(config.num_hidden_layers):
        separate = [name.replace("#", str(layer)) for name in _QKV]
        packed = _packed_names(config, layer)
        if unpack:
            _remap.convert(state_dict, 1, packed, separate, _thirds)
        elif len(packed) == 1:
            _remap.convert(state_dict, 1, separate, packed, _remap.concatenated)
        else:
            _remap.convert(state_dict, 1, separate[:1], packed[:1], lambda q: [q])
            _remap.convert(state_dict, 1, separate[1:], packed[1:], _remap.concatenated)


def _thirds(*packed: Tensor) -> list[Tensor]:
    """Queries, keys and values from [qkv] or [q, kv]."""
    return [part for tensor in packed for part in tensor.split(sum(map(len, packed)) // 3)]


def _norm_keys(state_dict: dict[str, Tensor], names: dict[str, str]) -> OrderedDict[str, Tensor]:
    """Rename the parameters of each LayerNorm."""

    def renamed(key: str) -> str:
        return re.sub(r"(?<=LayerNorm\.)\w+$", lambda m: names.get(m[0], m[0]), key)

    return OrderedDict((renamed(key), tensor) for key, tensor in state_dict.items())


def remap_state_dict(state_dict: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state dict of transformers' BertForPreTraining for ours.

    With pad_vocab_size_multiple, config.vocab_size is the padded one, as BertModel leaves it.
    """
    state_dict = _norm_keys(state_dict, {"gamma": "weight", "beta": "bias"})
    state_dict = _remap.rename(state_dict, _NAMES)
    _repack(state_dict, config, unpack=False)
    if getattr(config, "pad_vocab_size_multiple", 1) > 1:
        for name, value in _VOCABULARY.items():
            state_dict[name] = _remap.pad_rows(state_dict[name], config.vocab_size, value)
    return state_dict


def inv_remap_state_dict(state_dict: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The state dict of ours for transformers' BertForPreTraining.

    The norms have gamma and beta, as in the published checkpoints. With pad_vocab_size_multiple,
    config.orig_vocab_size says how many rows the vocabulary has without the padding.
    """
    state_dict = OrderedDict(state_dict)
    if getattr(config, "pad_vocab_size_multiple", 1) > 1:
        for name in _VOCABULARY:
            state_dict[name] = state_dict[name][: config.orig_vocab_size]
    _repack(state_dict, config, unpack=True)
    state_dict = _remap.rename(state_dict, _remap.inverse(_NAMES))
    return _norm_keys(state_dict, {"weight": "gamma", "bias": "beta"})
