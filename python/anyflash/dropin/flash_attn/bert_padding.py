"""Between padded batches and sequences that lie end to end."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from einops import rearrange, repeat  # noqa: F401  (clients import the names from here)
from torch import Tensor

from anyflash._autograd import has_readable_values, wants_operations


def _check_indices(indices: Tensor, rows: int) -> None:
    """On a CPU; elsewhere the device's own check stays."""
    if not has_readable_values(indices):
        return
    wrong = indices[(indices < 0) | (indices >= rows)]
    if wrong.numel():
        raise ValueError(f"indices: expected 0 <= index < {rows} rows, got {wrong[0].item()}")


class IndexFirstAxis(torch.autograd.Function):
    """input[indices]; the gradient of a row that was taken twice is the sum."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, indices: Tensor) -> Tensor:
        _check_indices(indices, input.shape[0])
        return input.index_select(0, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        input, indices = inputs
        ctx.save_for_backward(indices)
        ctx.rows = input.shape[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        gradient = grad_output.new_zeros((ctx.rows, *grad_output.shape[1:]))
        return gradient.index_add(0, indices, grad_output), None


def _put(values: Tensor, indices: Tensor, rows: int) -> Tensor:
    output = values.new_zeros((rows, *values.shape[1:]))
    return output.index_copy(0, indices.long(), values)  # clients pass int32 too


class IndexPutFirstAxis(torch.autograd.Function):
    """Zeros of first_axis_dim rows with output[indices] = values; indices are distinct."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
        _check_indices(indices, first_axis_dim)
        return _put(values, indices, first_axis_dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        return grad_output.index_select(0, indices), None, None


class IndexFirstAxisResidual(torch.autograd.Function):
    """(input[indices], input), so that the gradients of both arrive in one addition."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        _check_indices(indices, input.shape[0])
        return input.index_select(0, indices), input.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_residual: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return grad_residual.index_add(0, indices, grad_output), None


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices]; the gradient of a row that was taken twice is the sum.

    Raises:
        ValueError: on a CPU, an index that is no row.
    """
    if wants_operations():
        return input.index_select(0, indices)
    return IndexFirstAxis.apply(input, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros of first_axis_dim rows with output[indices] = values; indices are distinct.

    Raises:
        ValueError: on a CPU, an index that is no row.
    """
    if wants_operations():
        return _put(values, indices, first_axis_dim)
    return IndexPutFirstAxis.apply(values, indices, first_axis_dim)


index_first_axis_residual = IndexFirstAxisResidual.apply


def _cumulative(lengths: Tensor) -> Tensor:
    """(batch + 1,) int32: where each sequence begins, and the end."""
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _longest(lengths: Tensor) -> int:
    longest: Any = lengths.max().long().item() if lengths.numel() else 0
    return longest  # int() would not export


def _take(hidden_states: Tensor, indices: Tensor) -> Tensor:
    return index_first_axis(hidden_states.flatten(0, 1), indices)


def _check_per_token(name: str, tensor: Optional[Tensor], hidden_states: Tensor) -> None:
    """One value per token."""
    if tensor is not None and tensor.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name}: expected (batch, seqlen) of hidden_states {tuple(hidden_states.shape)}, got "
            f"{tuple(tensor.shape)}"
        )


def _check_zeros_and_ones(name: str, mask: Tensor) -> None:
    if mask.dtype == torch.bool or not has_readable_values(mask):
        return
    wrong = mask[(mask != 0) & (mask != 1)]
    if wrong.numel():
        raise ValueError(f"{name}: expected 0 or 1 for each token, got {wrong[0].item()}")


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

    Raises:
        ValueError: a mask of another shape; on a CPU, a value that is neither 0 nor 1.
    """
    _check_per_token("attention_mask", attention_mask, hidden_states)
    _check_per_token("unused_mask", unused_mask, hidden_states)
    taken = attention_mask if unused_mask is None else attention_mask + unused_mask
    _check_zeros_and_ones("attention_mask", attention_mask)
    if unused_mask is not None:
        _check_zeros_and_ones("attention_mask + unused_mask", taken)
    lengths = taken.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(taken.flatten()).flatten()
    return _take(hidden_states, indices), indices, _cumulative(lengths), _longest(lengths), used


def _check_lengths(name: str, lengths: Tensor) -> None:
    if not has_readable_values(lengths):
        return
    seqlen = lengths.shape[1]
    wrong = (lengths < 0).any(dim=1) | (lengths.sum(dim=1) > seqlen)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: expected lengths of 0 or more with a sum of at most seqlen {seqlen}, got "
            f"{lengths[row].tolist()} in row {row}"
        )


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

    Raises:
        ValueError: lengths of another shape; on a CPU, one below 0 or more tokens than a row has.
    """
    _check_per_token("attention_mask_in_length", attention_mask_in_length, hidden_states)
    _check_lengths("attention_mask_in_length", attention_mask_in_length)
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

    Raises:
        ValueError: on a CPU, an index outside the padded batch.
    """
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.unflatten(0, (batch, seqlen))
