"""What the conversions of checkpoints and configurations share.

Names of modules and tensors are written with a "#" for the number of the layer. The standard names,
those of GPTLMHeadModel, are the constants below.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flash_attn.utils import _optional

StateDict = Mapping[str, Tensor]
Config = Any  # an object with the attributes of a configuration, of transformers or not

WORDS = "transformer.embeddings.word_embeddings"
POSITIONS = "transformer.embeddings.position_embeddings"
NORM1 = "transformer.layers.#.norm1"
WQKV = "transformer.layers.#.mixer.Wqkv"
OUT_PROJ = "transformer.layers.#.mixer.out_proj"
NORM2 = "transformer.layers.#.norm2"
FC1 = "transformer.layers.#.mlp.fc1"
FC2 = "transformer.layers.#.mlp.fc2"
FINAL_NORM = "transformer.ln_f"
HEAD = "lm_head"


def rename(state_dict: StateDict, names: Mapping[str, str | None]) -> OrderedDict[str, Tensor]:
    """A state dict in which the modules and tensors `names` lists have their new names.

    The first entry that fits a key decides; None leaves the tensor out; other keys stay.
    """
    rules = [
        (re.compile(re.escape(old).replace(r"\#", r"(\d+)") + r"(?=\.|$)"), new)
        for old, new in names.items()
    ]
    renamed = OrderedDict()
    for key, tensor in state_dict.items():
        for pattern, new in rules:
            match = pattern.match(key)
            if match:
                if new is not None:
                    number = match.group(1) if pattern.groups else ""
                    renamed[new.replace("#", number) + key[match.end() :]] = tensor
                break
        else:
            renamed[key] = tensor
    return renamed


def inverse(names: Mapping[str, str | None]) -> dict[str, str]:
    """The table that undoes `rename`."""
    return {new: old for old, new in names.items() if new is not None}


def convert(
    state_dict: dict[str, Tensor],
    n_layer: int,
    old: Sequence[str],
    new: Sequence[str],
    function: Callable[..., Sequence[Tensor]],
) -> None:
    """In every layer, put function(*old weights) in their place under the new names; biases too.

    The function must act on the first dimension, so that it fits both. Where a layer has none of
    the old tensors, nothing happens.
    """
    for layer in range(n_layer):
        for kind in ("weight", "bias"):
            sources, targets = (
                [f"{name}.{kind}".replace("#", str(layer)) for name in names]
                for names in (old, new)
            )
            if any(source in state_dict for source in sources):
                results = function(*[state_dict.pop(source) for source in sources])
                state_dict.update(zip(targets, results))


def concatenated(*parts: Tensor) -> list[Tensor]:
    return [torch.cat(parts)]


def transposed(conv1d: Tensor) -> list[Tensor]:
    """The weight of GPT-2's Conv1D as nn.Linear stores it; a bias as it is."""
    return [conv1d.t()]


def separate_qkv(state_dict: dict[str, Tensor], config: Config) -> None:
    """Query, key and value heads one after the other, where each head had its own three."""

    def separate(qkv: Tensor) -> list[Tensor]:
        pattern = "(heads three dim) ... -> (three heads dim) ..."
        return [rearrange(qkv, pattern, heads=config.num_attention_heads, three=3)]

    convert(state_dict, layers(config), [WQKV], [WQKV], separate)


def layers(config: Config) -> int:
    return config.num_hidden_layers


def heads_kv(config: Config) -> int:
    """Heads of the keys; as many as of the queries unless the configuration says otherwise."""
    return getattr(config, "n_head_kv", None) or config.num_attention_heads


def padded_vocab_size(config: Config, vocab_size: int | None = None) -> int:
    """The vocabulary (config.vocab_size) rounded up to config.pad_vocab_size_multiple."""
    multiple = getattr(config, "pad_vocab_size_multiple", 1)
    return -(-(config.vocab_size if vocab_size is None else vocab_size) // multiple) * multiple


def pad_rows(tensor: Tensor, rows: int, value: float = 0.0) -> Tensor:
    """A weight or bias with so many rows."""
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, rows - tensor.shape[0]), value=value)


def pad_vocabulary(
    state_dict: dict[str, Tensor], config: Config, *, tied: bool, sharded: bool = False
) -> None:
    """Pad the word embeddings, and the head, which is the same tensor if they are tied.

    sharded: the tensors may be parts of a vocabulary, so each is padded from its own size.
    """

    def pad(name: str) -> None:
        if name in state_dict:
            tensor = state_dict[name]
            rows = padded_vocab_size(config, tensor.shape[0] if sharded else None)
            state_dict[name] = pad_rows(tensor, rows)

    pad(f"{WORDS}.weight")
    if tied:
        state_dict[f"{HEAD}.weight"] = state_dict[f"{WORDS}.weight"]
    else:
        pad(f"{HEAD}.weight")
        pad(f"{HEAD}.bias")


def unpad_vocabulary(tensor: Tensor, config: Config) -> Tensor:
    """The rows of the vocabulary, without those that pad_vocab_size_multiple added."""
    return tensor[: config.vocab_size] if padded_vocab_size(config) != config.vocab_size else tensor


def gpt2_config(**attributes: Any) -> Config:
    """A GPT2Config of transformers, with attributes that GPTModel reads beyond its own."""
    purpose = "the conversion to a GPT2Config"
    return _optional.load("transformers", purpose).GPT2Config(**attributes)


def expect(config: Config, name: str, *allowed: Any) -> None:
    """Refuse a configuration whose attribute, if there, asks for what the model can't compute."""
    value = getattr(config, name, allowed[0])
    if value not in allowed:
        expected = " or ".join(repr(a) for a in allowed)
        raise ValueError(f"{name} of {type(config).__name__}: expected {expected}, got {value!r}")


def rope_parameters(config: Config) -> dict[str, Any]:
    """What the configuration says of rotary embeddings, under any of transformers' names.

    Raises:
        ValueError: a kind that RotaryEmbedding does not compute (scaled, YaRN, ...).
    """
    found = dict(
        getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    )
    kind = found.get("rope_type", found.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type of {type(config).__name__}: expected 'default', got {kind!r}")
    for name, key in (
        ("rope_theta", "rope_theta"),
        ("rotary_emb_base", "rope_theta"),
        ("rotary_pct", "partial_rotary_factor"),
    ):
        if getattr(config, name, None) is not None:
            found[key] = getattr(config, name)
    return {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, **found}
