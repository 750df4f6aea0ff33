"""Between padded batches and sequences that lie end to end."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from einops import rearrange, repeat  # noqa: F401  (clients import the names from here)
from torch import Tensor
from torch.autograd.function import once_differentiable


class IndexFirstAxis(torch.autograd.Function):
    """input[indices]; the gradient of a row that was taken twice is the sum."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.rows = input.shape[0]
        return input.index_select(0, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        gradient = grad_output.new_zeros((ctx.rows, *grad_output.shape[1:]))
        return gradient.index_add_(0, indices, grad_output), None


class IndexPutFirstAxis(torch.autograd.Function):
    """Zeros of first_axis_dim rows with output[indices] = values; indices are distinct."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
        ctx.save_for_backward(indices)
        output = values.new_zeros((first_axis_dim, *values.shape[1:]))
        return output.index_copy_(0, indices.long(), values)  # clients pass int32 too

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        return grad_output.index_select(0, indices), None, None


class IndexFirstAxisResidual(torch.autograd.Function):
    """(input[indices], input), so that the gradients of both arrive in one addition."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(indices)
        return input.index_select(0, indices), input.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_residual: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return grad_residual.index_add(0, indices, grad_output), None


index_first_axis = IndexFirstAxis.apply
index_put_first_axis = IndexPutFirstAxis.apply
index_first_axis_residual = IndexFirstAxisResidual.apply


def _cumulative(lengths: Tensor) -> Tensor:
    """(batch + 1,) int32: where each sequence begins, and the end."""
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _longest(lengths: Tensor) -> int:
    return int(lengths.max()) if lengths.numel() else 0


def _take(hidden_states: Tensor, indices: Tensor) -> Tensor:
    return index_first_axis(hidden_states.flatten(0, 1), indices)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Optional[Tensor] = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Takes the tokens out of a padded batch.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen) bool or int, 1 for a token.
        unused_mask: (batch, seqlen), 1 for a place that is taken along but not used.

    Returns:
        hidden_states (total, ...); indices (total,) int64, where they were in the flattened batch;
        cu_seqlens (batch + 1,) int32; the longest sequence; (batch,) int32, tokens in use of each
        sequence.
    """
    taken = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = taken.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(taken.flatten()).flatten()
    return _take(hidden_states, indices), indices, _cumulative(lengths), _longest(lengths), used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """unpad_input for a batch whose rows hold several short sequences one after the other.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen) int: the lengths of a row's sequences, then zeros.
            [4, 1, 2, 0, 0, 0, 0, 0, 0]: a row of three sequences and two places of padding.

    Returns:
        hidden_states (total, ...); indices (total,) int64; cu_seqlens (sequences + 1,) int32; the
        longest sequence.
    """
    filled = attention_mask_in_length.sum(dim=-1, keepdim=True)
    place = torch.arange(attention_mask_in_length.shape[-1], device=filled.device)
    indices = torch.nonzero((place < filled).flatten()).flatten()
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths.nonzero().flatten()]
    return _take(hidden_states, indices), indices, _cumulative(lengths), _longest(lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of unpad_input.

    Args:
        hidden_states: (total, ...).
        indices: (total,) int32 or int64, where each token belongs in the flattened batch.
        batch: sequences.
        seqlen: of the padded batch.

    Returns:
        (batch, seqlen, ...), zero where no token belongs.
    """
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.unflatten(0, (batch, seqlen))
