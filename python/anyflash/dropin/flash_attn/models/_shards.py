"""State dicts of GPTLMHeadModel between one process and tensor parallel ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flash_attn.models import _remap
from flash_attn.models._remap import FC1, FC2, HEAD, OUT_PROJ, POSITIONS, WORDS, WQKV
from flash_attn.utils.distributed import get_dim_for_local_rank

GATED = ("glu", "swiglu", "geglu")

# Added once, after the sum over the ranks: the first one has them.
_FIRST_RANK_ONLY = (f"{OUT_PROJ}.bias", f"{FC2}.bias")


@dataclass(frozen=True)
class _Split:
    """How the ranks share a tensor.

    Along `dim` lie blocks (as the queries, keys and values of Wqkv) of these relative sizes. Each
    is shared out by itself, and consists of so many pieces that stay whole; None: of its rows.
    """

    dim: int
    blocks: tuple[int, ...] = (1,)
    pieces: int | None = None

    def _sizes(self, total: int, world_size: int) -> list[list[int]]:
        """Of each block, the size of each rank's part."""
        sizes = [total // sum(self.blocks) * block for block in self.blocks]
        units = [size // self.pieces if self.pieces else 1 for size in sizes]
        return [
            [get_dim_for_local_rank(size, world_size, rank, unit) for rank in range(world_size)]
            for size, unit in zip(sizes, units)
        ]

    def shard(self, tensor: Tensor, world_size: int, rank: int) -> Tensor:
        sizes = self._sizes(tensor.shape[self.dim], world_size)
        pieces = tensor.split([size for block in sizes for size in block], self.dim)
        return torch.cat(pieces[rank::world_size], self.dim)

    def combine(self, shards: Sequence[Tensor]) -> Tensor:
        sizes = self._sizes(sum(shard.shape[self.dim] for shard in shards), len(shards))
        pieces = [
            shard.split([block[rank] for block in sizes], self.dim)
            for rank, shard in enumerate(shards)
        ]
        return torch.cat([p for block in zip(*pieces) for p in block], self.dim)


def _splits(config: Any) -> dict[str, _Split]:
    """How each tensor is shared; those that are not listed are the same on all ranks."""
    n_head, n_head_kv = config.num_attention_heads, _remap.heads_kv(config)
    # Query heads go where the key head is that they share.
    qkv = _Split(0, (n_head, n_head_kv, n_head_kv), pieces=n_head_kv)
    fc1 = _Split(0, (1, 1) if config.activation_function in GATED else (1,))
    return {
        f"{WORDS}.weight": _Split(0),
        f"{POSITIONS}.weight": _Split(-1),
        f"{HEAD}.weight": _Split(0),
        f"{HEAD}.bias": _Split(0),
        f"{WQKV}.weight": qkv,
        f"{WQKV}.bias": qkv,
        f"{OUT_PROJ}.weight": _Split(-1, pieces=n_head_kv),
        f"{FC1}.weight": fc1,
        f"{FC1}.bias": fc1,
        f"{FC2}.weight": _Split(-1),
    }


def _check(config: Any, world_size: int) -> None:
    inner = config.n_inner if config.n_inner is not None else 4 * config.hidden_size
    for name, size in (
        ("padded vocabulary", _remap.padded_vocab_size(config)),
        ("hidden_size", config.hidden_size),
        ("n_inner", inner),
    ):
        if size % world_size:
            raise ValueError(f"{name}: expected a multiple of world_size {world_size}, got {size}")
    heads_kv = _remap.heads_kv(config)
    if heads_kv < world_size:
        raise ValueError(
            f"key heads: expected one or more per rank of world_size {world_size}, got {heads_kv}"
        )


def _numbered(state_dict: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Each key, and the key with "#" for the number of the layer."""
    for key in list(state_dict):
        yield key, re.sub(r"^(transformer\.layers\.)\d+\.", r"\1#.", key)


def shard_state_dict_tp(
    state_dict: dict[str, Tensor], config: Any, world_size: int, rank: int
) -> dict[str, Tensor]:
    """What one rank of a tensor parallel GPTLMHeadModel loads of a whole one's state dict.

    Heads that world_size doesn't divide are shared out unevenly, the first ranks having more; a key
    head stays with the query heads that use it.
    state_dict itself is changed, and returned.

    Raises:
        ValueError: a vocabulary, hidden size or n_inner that world_size doesn't divide, fewer key
            heads than ranks, or a rank outside 0 .. world_size - 1.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected one of 0 .. {world_size - 1}, got {rank}")
    _check(config, world_size)
    splits = _splits(config)
    for key, name in _numbered(state_dict):
        if name in splits:
            state_dict[key] = splits[name].shard(state_dict[key], world_size, rank)
        elif name in _FIRST_RANK_ONLY and rank != 0:
            del state_dict[key]
    return state_dict


def combine_state_dicts_tp(state_dicts: list[dict[str, Tensor]], config: Any) -> dict[str, Tensor]:
    """The state dict of a whole GPTLMHeadModel from those of the ranks, in their order.

    Undoes shard_state_dict_tp, and takes Meta's shards, which split words along the hidden size.

    Raises:
        ValueError: no state dicts, or sizes that their number doesn't divide.
    """
    if not state_dicts:
        raise ValueError("state_dicts: expected one per rank, got none")
    world_size, splits = len(state_dicts), _splits(config)
    _check(config, world_size)
    combined = dict(state_dicts[0])
    for key, name in _numbered(combined):
        if name not in splits:
            continue
        shards, split = [shard[key] for shard in state_dicts], splits[name]
        if name in (f"{WORDS}.weight", f"{HEAD}.weight"):
            by_rows = shards[0].shape[0] == _remap.padded_vocab_size(config) // world_size
            split = replace(split, dim=0 if by_rows else 1)
        combined[key] = split.combine(shards)
    return combined
