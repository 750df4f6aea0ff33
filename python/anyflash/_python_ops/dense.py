"""Attention over one dense batch, composed from plain operators in chunks of query rows: all
features, any device, no host sync."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import philox
from .arguments import AttentionArgs, BackwardArgs
from .dense_mask import INFINITY, Chunk, DenseBatch, DenseMask, chunks
from .far_rows import far_rows, weight_of_far_rows


def _flat_heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, seqlen, heads, dim) -> (batch * heads, seqlen, dim)."""
    batch, seqlen, heads, dim = x.shape
    return x.transpose(1, 2).to(dtype).reshape(batch * heads, seqlen, dim)


def _grouped(x: Tensor, heads_k: int, dtype: torch.dtype) -> Tensor:
    """Rows of all query heads of one key head together: (batch, rows, heads, dim) -> (batch *
    heads_k, group * rows, dim)."""
    batch, rows, heads, dim = x.shape
    return x.transpose(1, 2).to(dtype).reshape(batch * heads_k, heads // heads_k * rows, dim)


class DenseAttention(DenseMask):
    """Scores of the chunks of one batch."""

    def __init__(self, args: AttentionArgs, batch: DenseBatch) -> None:
        super().__init__(args, batch)
        self.dtype = args.compute_dtype
        self.keys = _flat_heads(batch.k, self.dtype)
        self.values = _flat_heads(batch.v, self.dtype)

    def chunk_keys(self, storage: Tensor, chunk: Chunk) -> Tensor:
        """Of keys or values, what a chunk needs: (sequences * heads_k, columns, dim)."""
        first, last = (chunk.sequences[0], chunk.sequences[-1] + 1)
        heads_k = self.args.heads_k
        return storage[first * heads_k : last * heads_k, chunk.columns.start : chunk.columns.stop]

    def queries(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Of a tensor of q's or out's shape, a chunk's rows grouped by key head, in the dtype of
        computation."""
        b, rows = chunk.sequences, chunk.rows
        picked = x[b.start : b.stop, rows.start : rows.stop]
        return _grouped(picked, self.args.heads_k, self.dtype)

    def ungrouped(self, x: Tensor, chunk: Chunk) -> Tensor:
        """(sequences * heads_k, group * rows, dim) -> (sequences, rows, heads, dim)."""
        shape = (len(chunk.sequences), self.args.heads, len(chunk.rows), x.shape[-1])
        return x.view(shape).transpose(1, 2)

    def by_head(self, x: Tensor, chunk: Chunk) -> Tensor:
        """The same for scores: (sequences, heads, rows, columns)."""
        return x.view(len(chunk.sequences), self.args.heads, len(chunk.rows), len(chunk.columns))

    def scores(self, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        """Scores (sequences, heads, rows, columns), -inf where hidden, and tanh of the softcap if
        there is one."""
        args, batch = self.args, self.batch
        queries = self.queries(batch.q, chunk) * args.softmax_scale
        s = self.by_head(queries @ self.chunk_keys(self.keys, chunk).transpose(1, 2), chunk)
        tanh = None
        if args.softcap > 0.0:
            tanh = s.div_(args.softcap).tanh_()
            s = tanh * args.softcap
        if batch.alibi_slopes is not None:
            slopes = batch.alibi_slopes.to(self.dtype)
            if slopes.shape[0] > 1:
                slopes = slopes[chunk.sequences.start : chunk.sequences.stop]
            position, columns = self.positions(chunk)
            distance = columns if args.purely_causal else (position - columns).abs().neg()
            s.add_(slopes[:, :, None, None] * distance)
        if batch.bias is not None:
            bias = self.bias(batch.bias, chunk)
            if bias.dtype == torch.bool:
                s.masked_fill_(~bias, -INFINITY)
            else:
                s.add_(bias)
        visible = self.visible(chunk)
        if visible is not None:
            s.masked_fill_(~visible, -INFINITY)
        return s, tanh

    def dropout(self, chunk: Chunk) -> Tensor | None:
        """What dropout multiplies a chunk's probabilities with; None without dropout."""
        args = self.args
        if args.dropout_p == 0.0 or args.rng_state is None:
            return None
        first = self.batch.first_sequence
        kept = philox.keep_mask(
            args.rng_state,
            args.dropout_p,
            range(first + chunk.sequences.start, first + chunk.sequences.stop),
            args.heads,
            chunk.rows,
            chunk.columns,
        )
        return kept.to(self.dtype).mul_(1.0 / (1.0 - args.dropout_p))


def _reference_of(row_max: Tensor, sinks: Tensor | None) -> Tensor:
    """The largest logit of each row, the sink among them; 0 of a row without any."""
    largest = row_max if sinks is None else torch.maximum(row_max, sinks)
    return largest.masked_fill(largest == -INFINITY, 0.0)


def _total(p: Tensor, reference: Tensor, sinks: Tensor | None) -> Tensor:
    """The sum of each row's weights exp(logit - reference), the sink's among them."""
    total = p.sum(-1)
    return total if sinks is None else total + torch.exp(sinks - reference)


def forward_batch(args: AttentionArgs, batch: DenseBatch, out: Tensor, lse: Tensor) -> None:
    """Fills out (batch, seqlen_q, heads, head_dim_v) and lse (batch, heads, seqlen_q)."""
    dense = DenseAttention(args, batch)
    sinks = None if args.sinks is None else args.sinks.to(dense.dtype)[:, None]
    for chunk in chunks(args, batch):
        b, rows = chunk.sequences, chunk.rows
        chunk_out = out[b.start : b.stop, rows.start : rows.stop]
        chunk_lse = lse[b.start : b.stop, :, rows.start : rows.stop]
        if len(chunk.columns) == 0:
            chunk_out.zero_()
            chunk_lse.fill_(INFINITY)
            continue
        s, _ = dense.scores(chunk)
        row_max = s.amax(-1)
        hidden = row_max == -INFINITY
        reference = _reference_of(row_max, sinks)
        p = s.sub_(reference.unsqueeze(-1)).exp_()
        total = _total(p, reference, sinks)
        row_lse = (total.log() + reference).masked_fill_(hidden, INFINITY)
        # A row without keys has no weights, and a sink may be far above them.
        p.div_(total.masked_fill_(hidden, 1.0).unsqueeze(-1))
        dropout = dense.dropout(chunk)
        if dropout is not None:
            p.mul_(dropout)
        values = dense.chunk_keys(dense.values, chunk)
        flat = p.view(values.shape[0], -1, len(chunk.columns))
        chunk_out.copy_(dense.ungrouped(flat @ values, chunk))
        chunk_lse.copy_(row_lse)


def _reduce_to(x: Tensor, target: Tensor) -> Tensor:
    """Sums the dimensions in which target has size 1."""
    dims = [d for d in range(x.dim()) if target.shape[d] == 1 and x.shape[d] != 1]
    return x.sum(dims, keepdim=True) if dims else x


class BatchGradients(NamedTuple):
    """Gradients of one batch, in the dtype of computation; dq is written as it comes."""

    dq: Tensor  # (batch, seqlen_q, heads, head_dim)
    dk: Tensor  # (batch * heads_k, seqlen_k, head_dim)
    dv: Tensor  # (batch * heads_k, seqlen_k, head_dim_v)
    dbias: Tensor | None  # of batch.bias' shape
    dsinks: Tensor | None  # (heads,)


def backward_batch(
    args: AttentionArgs,
    batch: DenseBatch,
    grad: BackwardArgs,
    delta: Tensor,
    target: BatchGradients,
) -> None:
    """Adds the gradients of a batch. delta (batch, heads, seqlen_q): rowsum(dout * out) - dlse."""
    dense = DenseAttention(args, batch)
    sinks = None if args.sinks is None else args.sinks.to(dense.dtype)[:, None]
    lse, dout = batch.stats(grad.lse), batch.rows(grad.dout)
    for chunk in chunks(args, batch):
        b, rows = chunk.sequences, chunk.rows
        dq = target.dq[b.start : b.stop, rows.start : rows.stop]
        if len(chunk.columns) == 0:
            dq.zero_()
            continue
        s, tanh = dense.scores(chunk)
        reference = row_lse = lse[b.start : b.stop, :, rows.start : rows.stop]
        row_delta = delta[b.start : b.stop, :, rows.start : rows.stop]
        chunk_dout = dense.queries(dout, chunk)
        far = far_rows(row_lse)
        if far is not None:
            reference = torch.where(far, _reference_of(s.amax(-1), sinks), row_lse)
        p = s.sub_(reference.unsqueeze(-1)).exp_()
        if far is not None:
            # Everything is linear in dout and delta, which therefore take the sum of the weights.
            total = _total(p, reference, sinks)
            weight = weight_of_far_rows(far, total, reference, row_lse)
            row_delta = row_delta * weight
            chunk_dout = chunk_dout * weight.reshape(chunk_dout.shape[0], -1, 1)
        if target.dsinks is not None and sinks is not None:
            # lse is +inf where a row sees no key.
            target.dsinks.sub_((torch.exp(sinks - reference) * row_delta).sum(dim=(0, 2)))
        flat = (-1, len(chunk.rows) * (args.heads // args.heads_k), len(chunk.columns))
        dp = chunk_dout @ dense.chunk_keys(dense.values, chunk).transpose(1, 2)
        dp = dense.by_head(dp, chunk)
        dropout = dense.dropout(chunk)
        if dropout is not None:
            dp.mul_(dropout)
            dropped = dropout.mul_(p)
        else:
            dropped = p
        dense.chunk_keys(target.dv, chunk).add_(dropped.view(flat).transpose(1, 2) @ chunk_dout)
        ds = dp.sub_(row_delta.unsqueeze(-1)).mul_(p)
        if target.dbias is not None:
            chunk_dbias = dense.bias(target.dbias, chunk)
            chunk_dbias.add_(_reduce_to(ds, chunk_dbias))
        if tanh is not None:
            ds.mul_(tanh.square_().neg_().add_(1.0))
        ds = ds.mul_(args.softmax_scale).view(flat)
        dq.copy_(dense.ungrouped(ds @ dense.chunk_keys(dense.keys, chunk), chunk))
        chunk_q = dense.queries(batch.q, chunk)
        dense.chunk_keys(target.dk, chunk).add_(ds.transpose(1, 2) @ chunk_q)
