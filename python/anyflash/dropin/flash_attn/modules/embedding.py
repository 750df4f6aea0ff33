"""Embeddings of tokens, positions and token types, on one process or spread over a group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flash_attn.utils.distributed import all_reduce, reduce_scatter


def _world_size(process_group: Any) -> int:
    return 1 if process_group is None else torch.distributed.get_world_size(process_group)


def _own_share(name: str, size: int, process_group: Any) -> int:
    world_size = _world_size(process_group)
    if size % world_size:
        raise ValueError(f"{name} ({size}) must be divisible by world_size ({world_size})")
    return size // world_size


def _positions_of(input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
    if position_ids is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device)
    return position_ids


def _with_positions(
    module: Any, embeddings: Tensor, input_ids: Tensor, position_ids: Tensor | None
) -> Tensor:
    """The embeddings plus those of their positions, if the module has such."""
    if module.max_position_embeddings <= 0:
        return embeddings
    return embeddings + module.position_embeddings(_positions_of(input_ids, position_ids))


class GPT2Embeddings(nn.Module):
    """Tokens plus learnt positions.

    Args:
        embed_dim: features of the result.
        vocab_size: rows of word_embeddings.
        max_position_embeddings: rows of position_embeddings; 0 or less: none.
        padding_idx: the token whose embedding is not trained.
        word_embed_proj_dim: features of word_embeddings, which project_in brings to embed_dim.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        padding_idx: int | None = None,
        word_embed_proj_dim: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        width = embed_dim if word_embed_proj_dim is None else word_embed_proj_dim
        self.word_embeddings = nn.Embedding(vocab_size, width, padding_idx=padding_idx, **kind)
        self.project_in = None
        if word_embed_proj_dim is not None:
            self.project_in = nn.Linear(width, embed_dim, bias=False, **kind)
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(max_position_embeddings, embed_dim, **kind)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """(batch, seqlen, embed_dim) of input_ids (batch, seqlen) and position_ids (batch, seqlen)
        or (seqlen,); None: counted from 0."""
        words = self.word_embeddings(input_ids)
        projected = words if self.project_in is None else self.project_in(words)
        return _with_positions(self, projected, input_ids, position_ids)


class BertEmbeddings(nn.Module):
    """Tokens plus learnt positions plus token types.

    Args:
        type_vocab_size: rows of token_type_embeddings; 0 or less: none.
        others: as GPT2Embeddings.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        type_vocab_size: int,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.word_embeddings = nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx, **kind)
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(max_position_embeddings, embed_dim, **kind)
        if type_vocab_size > 0:
            self.token_type_embeddings = nn.Embedding(type_vocab_size, embed_dim, **kind)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """(batch, seqlen, embed_dim) of ids (batch, seqlen); position_ids None: counted from 0,
        token_type_ids None: type 0."""
        words = self.word_embeddings(input_ids)
        placed = _with_positions(self, words, input_ids, position_ids)
        if self.type_vocab_size <= 0:
            return placed
        if token_type_ids is None:
            token_type_ids = input_ids.new_zeros(input_ids.shape[1:])
        return placed + self.token_type_embeddings(token_type_ids)


class VocabParallelEmbedding(nn.Embedding):
    """An embedding whose rows are spread over the processes of a group.

    Each process gives zeros for tokens that it does not have: the sum over the group is the
    embedding, and is left to the caller.

    Raises:
        ValueError: num_embeddings is no multiple of the number of processes.
        RuntimeError: padding_idx with more than one process.
    """

    def __init__(
        self,
        num_embeddings: int,
        *args: Any,
        process_group: Any = None,
        padding_idx: int | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs["padding_idx"] = padding_idx
        own = _own_share("num_embeddings", num_embeddings, process_group)
        if own != num_embeddings and padding_idx is not None:
            raise RuntimeError(
                f"ParallelEmbedding does not support padding_idx: expected None, got {padding_idx}"
            )
        super().__init__(own, *args, **kwargs)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        """(..., embedding_dim) of ids (...) of the whole vocabulary."""
        if self.process_group is None:
            return super().forward(input)
        own = self.num_embeddings
        first = torch.distributed.get_rank(self.process_group) * own
        total = _world_size(self.process_group) * own
        # An id outside the whole vocabulary stays one that no table has, so that it is an error.
        elsewhere = (input >= 0) & (input < total) & ((input < first) | (input >= first + own))
        rows = super().forward((input - first).masked_fill(elsewhere, 0))
        return rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)


class ColumnParallelEmbedding(nn.Embedding):
    """An embedding of which each process of a group holds some features, for all rows.

    Raises:
        ValueError: embedding_dim is no multiple of the number of processes.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *args: Any,
        process_group: Any = None,
        **kwargs: Any,
    ) -> None:
        own = _own_share("embedding_dim", embedding_dim, process_group)
        super().__init__(num_embeddings, own, *args, **kwargs)
        self.process_group = process_group


class ParallelGPT2Embeddings(nn.Module):
    """GPT2Embeddings spread over a group: tokens by rows, positions by features.

    Args:
        process_group: of torch.distributed.
        sequence_parallel: each process gets its share of the first dimension; False: all of it.
        others: as GPT2Embeddings.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        process_group: Any,
        padding_idx: int | None = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind = {"process_group": process_group, "device": device, "dtype": dtype}
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.word_embeddings = VocabParallelEmbedding(
            vocab_size, embed_dim, padding_idx=padding_idx, **kind
        )
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = ColumnParallelEmbedding(
                max_position_embeddings, embed_dim, **kind
            )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        combine_batch_seqlen_dim: bool = False,
    ) -> Tensor:
        """Embeds.

        Args:
            input_ids: (batch, seqlen), the same on all processes.
            position_ids: (batch, seqlen) or (seqlen,); None: counted from 0.
            combine_batch_seqlen_dim: the first dimension of the result is batch * seqlen.

        Returns:
            (batch, seqlen, embed_dim) or (batch * seqlen, embed_dim); with sequence_parallel this
            process's share of the first dimension.
        """
        world_size = _world_size(self.process_group)
        embeddings = self.word_embeddings(input_ids)
        if self.max_position_embeddings > 0:
            positions = self.position_embeddings(_positions_of(input_ids, position_ids))
            width = positions.shape[-1]
            first = 0 if world_size == 1 else width * torch.distributed.get_rank(self.process_group)
            others = embeddings.shape[-1] - first - width
            embeddings = embeddings + nn.functional.pad(positions, (first, others))
        if combine_batch_seqlen_dim:
            embeddings = embeddings.flatten(0, 1)
        if world_size == 1:
            return embeddings
        combine = reduce_scatter if self.sequence_parallel else all_reduce
        return combine(embeddings, self.process_group)
