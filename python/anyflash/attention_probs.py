"""What flash_attn returns beside attention: the dropout pattern, and the backward's row sums.

Both are composed from plain operators with the masks and the dropout bits of the Python provider,
whichever provider runs.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from ._numbers import real

#: Below it no random half-word is small enough to drop anything (kernels/philox.h), so there is no
#: dropout to compute.
NEGLIGIBLE_DROPOUT = 2.0**-17
#: Lengths are rounded up to it in what the original library returns.
ROUNDING = 128


def effective_dropout(dropout_p: float) -> float:
    """dropout_p, or 0 where it is too small to drop anything: 1e-30 asks for the pattern alone."""
    if type(dropout_p) is not float:
        dropout_p = real("dropout_p", dropout_p)
    return 0.0 if 0.0 < dropout_p < NEGLIGIBLE_DROPOUT else dropout_p


def round_up(length: int) -> int:
    """The next multiple of 128."""
    return -(-length // ROUNDING) * ROUNDING


@torch.no_grad()
def signed_probabilities(
    q: Tensor,
    k: Tensor,
    *,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    max_seqlen_q: Union[int, Tensor] = 0,
    max_seqlen_k: Union[int, Tensor] = 0,
    seqused_k: Optional[Tensor] = None,
    leftpad_k: Optional[Tensor] = None,
    block_table: Optional[Tensor] = None,
    alibi_slopes: Optional[Tensor] = None,
    rng_state: Optional[Tensor],
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    """exp(score - the row's largest score), with a minus sign where dropout drops the probability.

    Args:
        q, k and the options: as in ``anyflash.attention``; packed sequences need both max_seqlens.
        rng_state: (2,) int64 seed and offset; None: nothing is dropped.

    Returns:
        (batch, heads, max_seqlen_q, max_seqlen_k) in q's dtype, both lengths rounded up to 128; 0
        where a key is hidden.
    """
    from ._python_ops import philox
    from ._python_ops.arguments import AttentionArgs
    from ._python_ops.batches import batches_of
    from ._python_ops.dense import DenseAttention
    from ._python_ops.dense_mask import chunks

    single = q.dim() == 3 and cu_seqlens_q is None
    if single:
        q, k = q.unsqueeze(0), k.unsqueeze(0)
    args = AttentionArgs(
        q, k, k, cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k), seqused_k,
        leftpad_k, block_table, alibi_slopes, None, None, rng_state, dropout_p, softmax_scale,
        *window_size, softcap, False,
    )  # fmt: skip
    args.normalise(causal)
    lengths = (round_up(args.max_seqlen_q), round_up(args.max_seqlen_k))
    result = q.new_zeros((args.batch, args.heads, *lengths))
    for batch in batches_of(args):
        dense = DenseAttention(args, batch)
        for chunk in chunks(args, batch):
            if len(chunk.columns) == 0:
                continue
            scores, _ = dense.scores(chunk)
            largest = scores.amax(-1, keepdim=True)
            largest.masked_fill_(largest.isinf(), 0.0)  # rows that see nothing
            values = scores.sub_(largest).exp_()
            first = batch.first_sequence + chunk.sequences.start
            sequences = range(first, first + len(chunk.sequences))
            if rng_state is not None:
                kept = philox.keep_mask(
                    rng_state, dropout_p, sequences, args.heads, chunk.rows, chunk.columns
                )
                values = torch.where(kept, values, -values)
            result[
                sequences.start : sequences.stop,
                :,
                chunk.rows.start : chunk.rows.stop,
                chunk.columns.start : chunk.columns.stop,
            ] = values.to(q.dtype)
    return result[0] if single else result


@torch.no_grad()
def softmax_d(dout: Tensor, out: Tensor, cu_seqlens_q: Optional[Tensor] = None) -> Tensor:
    """Sum over each row of dout * out, where the original library's backward leaves it.

    Args:
        dout: out's shape.
        out: (batch, seqlen_q, heads, head_dim), packed (total_q, heads, head_dim).
        cu_seqlens_q: (batch + 1,) int32, packed only.

    Returns:
        fp32; (batch, heads, seqlen_q rounded up to 128), packed (heads, total_q + 128 * batch)
        where sequence i begins 128 * i columns later. 0 in between.
    """
    sums = (dout.float() * out.float()).sum(-1).transpose(-1, -2)
    if cu_seqlens_q is None:
        length = sums.shape[-1]
        return torch.nn.functional.pad(sums, (0, round_up(length) - length)).contiguous()
    batch = cu_seqlens_q.shape[0] - 1
    total = sums.shape[-1]
    result = sums.new_zeros((sums.shape[0], total + ROUNDING * batch))
    if batch > 0:
        row = torch.arange(total, device=out.device)
        sequence = torch.searchsorted(cu_seqlens_q[1:].long(), row, right=True)
        result[:, row + ROUNDING * sequence.clamp_(max=batch - 1)] = sums
    return result
