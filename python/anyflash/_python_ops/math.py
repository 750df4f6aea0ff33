"""Attention composed from plain operators (dense.py): everything, on every device, in every dtype.

Scores exist for one chunk of rows at a time, so memory grows with the sequence length and not with
its square.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import AttentionArgs, BackwardArgs, Gradients
from .batches import batches_of, covers_everything
from .dense import BatchGradients, backward_batch, forward_batch
from .dense_mask import INFINITY, DenseBatch
from .results import empty_results, four_dims
from .runs import Run, bias_block


def forward(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """out and lse of schemas.def."""
    out, lse = empty_results(args)
    if not covers_everything(args):
        out.zero_()
        lse.fill_(INFINITY)
    for batch in batches_of(args):
        if isinstance(batch, Run):
            forward_batch(args, batch, batch.rows(out), batch.stats(lse))
        else:
            padded_out = out.new_empty((*batch.q.shape[:3], args.head_dim_v))
            padded_lse = lse.new_empty((batch.sequences, args.heads, batch.seqlen_q))
            forward_batch(args, batch, padded_out, padded_lse)
            batch.put_rows(out, padded_out)
            batch.put_stats(lse, padded_lse)
    return out, lse


def _bias_view(dbias: Tensor | None, batch: DenseBatch) -> Tensor | None:
    """The view of the bias' gradient that belongs to a batch."""
    if dbias is None:
        return None
    dbias = four_dims(dbias)
    if not isinstance(batch, Run) or batch.sequence is None:
        return dbias
    return bias_block(dbias, batch.sequence, batch.seqlen_q, batch.seqlen_k)


def backward(args: AttentionArgs, grad: BackwardArgs) -> Gradients:
    """Gradients of schemas.def, from the out and lse that are given."""
    dtype = args.compute_dtype
    dq, dk, dv = (torch.empty_like(x) for x in (args.q, args.k, args.v))
    if not covers_everything(args):
        for gradient in (dq, dk, dv):
            gradient.zero_()
    dbias = dsinks = None
    if grad.bias_requires_grad and args.bias is not None:
        dbias = torch.zeros_like(args.bias, dtype=dtype)
    if grad.sinks_requires_grad and args.sinks is not None:
        dsinks = torch.zeros_like(args.sinks, dtype=dtype)
    for batch in batches_of(args):
        delta = (batch.rows(grad.dout).to(dtype) * batch.rows(grad.out)).sum(-1).transpose(1, 2)
        if grad.dlse is not None:
            delta = delta - batch.stats(grad.dlse)
        in_place = isinstance(batch, Run)
        heads = batch.sequences * args.heads_k
        target = BatchGradients(
            batch.rows(dq) if in_place else torch.zeros_like(batch.q),
            delta.new_zeros((heads, batch.seqlen_k, args.head_dim)),
            delta.new_zeros((heads, batch.seqlen_k, args.head_dim_v)),
            _bias_view(dbias, batch),
            dsinks,
        )
        backward_batch(args, batch, grad, delta, target)
        if not in_place:
            batch.put_rows(dq, target.dq)
        for gradient, value in ((dk, target.dk), (dv, target.dv)):
            by_head = value.view(batch.sequences, args.heads_k, batch.seqlen_k, value.shape[-1])
            batch.put_keys(gradient, by_head.transpose(1, 2))
    if dbias is not None:
        dbias = torch.empty_like(args.bias).copy_(dbias)  # type: ignore[arg-type]
    if dsinks is not None:
        dsinks = dsinks.to(args.sinks.dtype)  # type: ignore[union-attr]
    return Gradients(dq, dk, dv, dbias, dsinks)
