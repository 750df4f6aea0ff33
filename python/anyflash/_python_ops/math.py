"""Attention composed from plain operators, in chunks of queries: everything, on every device, in
every dtype.

Scores exist for one chunk at a time, so memory grows with the sequence length and not with its
square.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import philox
from .arguments import AttentionArgs, BackwardArgs, Gradients
from .blocks import Block, Masks, blocks
from .far_rows import far_rows, weight_of_far_rows
from .parts import INFINITY, Part, ViewPart, bias_of, covers_everything, parts_of


def _flat_heads(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, seqlen, heads, dim) -> (batch * heads, seqlen, dim)."""
    batch, seqlen, heads, dim = x.shape
    return x.transpose(1, 2).to(dtype).reshape(batch * heads, seqlen, dim)


def _grouped(x: Tensor, heads_k: int, dtype: torch.dtype) -> Tensor:
    """Rows of all query heads of one key head together: (batch, rows, heads, dim) -> (batch *
    heads_k, group * rows, dim)."""
    batch, rows, heads, dim = x.shape
    return x.transpose(1, 2).to(dtype).reshape(batch * heads_k, heads // heads_k * rows, dim)


class Scorer(Masks):
    """Scores of the blocks of one part."""

    def __init__(self, args: AttentionArgs, part: Part) -> None:
        super().__init__(args, part)
        self.dtype = args.compute_dtype
        self.keys = _flat_heads(part.k, self.dtype)
        self.values = _flat_heads(part.v, self.dtype)

    def of_block(self, storage: Tensor, block: Block) -> Tensor:
        """Of keys or values, what a block needs: (sequences * heads_k, columns, dim)."""
        first, last = (block.sequences[0], block.sequences[-1] + 1)
        heads_k = self.args.heads_k
        return storage[first * heads_k : last * heads_k, block.columns.start : block.columns.stop]

    def queries(self, x: Tensor, block: Block) -> Tensor:
        """Of a tensor of q's or out's shape, a block's rows grouped by key head, in the dtype of
        computation."""
        b, rows = block.sequences, block.rows
        chunk = x[b.start : b.stop, rows.start : rows.stop]
        return _grouped(chunk, self.args.heads_k, self.dtype)

    def ungrouped(self, x: Tensor, block: Block) -> Tensor:
        """(sequences * heads_k, group * rows, dim) -> (sequences, rows, heads, dim)."""
        shape = (len(block.sequences), self.args.heads, len(block.rows), x.shape[-1])
        return x.view(shape).transpose(1, 2)

    def by_head(self, x: Tensor, block: Block) -> Tensor:
        """The same for scores: (sequences, heads, rows, columns)."""
        return x.view(len(block.sequences), self.args.heads, len(block.rows), len(block.columns))

    def scores(self, block: Block) -> tuple[Tensor, Tensor | None]:
        """Scores (sequences, heads, rows, columns), -inf where hidden, and tanh of the softcap if
        there is one."""
        args, part = self.args, self.part
        queries = self.queries(part.q, block) * args.softmax_scale
        s = self.by_head(queries @ self.of_block(self.keys, block).transpose(1, 2), block)
        tanh = None
        if args.softcap > 0.0:
            tanh = s.div_(args.softcap).tanh_()
            s = tanh * args.softcap
        if part.alibi_slopes is not None:
            slopes = part.alibi_slopes.to(self.dtype)
            if slopes.shape[0] > 1:
                slopes = slopes[block.sequences.start : block.sequences.stop]
            position, columns = self.positions(block)
            distance = columns if args.purely_causal else (position - columns).abs().neg()
            s.add_(slopes[:, :, None, None] * distance)
        if part.bias is not None:
            bias = self.bias(part.bias, block)
            if bias.dtype == torch.bool:
                s.masked_fill_(~bias, -INFINITY)
            else:
                s.add_(bias)
        visible = self.visible(block)
        if visible is not None:
            s.masked_fill_(~visible, -INFINITY)
        return s, tanh

    def dropout(self, block: Block) -> Tensor | None:
        """What dropout multiplies a block's probabilities with; None without dropout."""
        args = self.args
        if args.dropout_p == 0.0 or args.rng_state is None:
            return None
        first = self.part.first_sequence
        kept = philox.keep_mask(
            args.rng_state,
            args.dropout_p,
            range(first + block.sequences.start, first + block.sequences.stop),
            args.heads,
            block.rows,
            block.columns,
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


def _part_forward(args: AttentionArgs, part: Part, out: Tensor, lse: Tensor) -> None:
    """Fills out (batch, seqlen_q, heads, head_dim_v) and lse (batch, heads, seqlen_q)."""
    scorer = Scorer(args, part)
    sinks = None if args.sinks is None else args.sinks.to(scorer.dtype)[:, None]
    for block in blocks(args, part):
        b, rows = block.sequences, block.rows
        block_out = out[b.start : b.stop, rows.start : rows.stop]
        block_lse = lse[b.start : b.stop, :, rows.start : rows.stop]
        if len(block.columns) == 0:
            block_out.zero_()
            block_lse.fill_(INFINITY)
            continue
        s, _ = scorer.scores(block)
        row_max = s.amax(-1)
        hidden = row_max == -INFINITY
        reference = _reference_of(row_max, sinks)
        p = s.sub_(reference.unsqueeze(-1)).exp_()
        total = _total(p, reference, sinks)
        row_lse = (total.log() + reference).masked_fill_(hidden, INFINITY)
        # A row without keys has no weights, and a sink may be far above them.
        p.div_(total.masked_fill_(hidden, 1.0).unsqueeze(-1))
        dropout = scorer.dropout(block)
        if dropout is not None:
            p.mul_(dropout)
        values = scorer.of_block(scorer.values, block)
        flat = p.view(values.shape[0], -1, len(block.columns))
        block_out.copy_(scorer.ungrouped(flat @ values, block))
        block_lse.copy_(row_lse)


def forward(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """out and lse of schemas.def."""
    out, lse = empty_results(args)
    if not covers_everything(args):
        out.zero_()
        lse.fill_(INFINITY)
    for part in parts_of(args):
        if isinstance(part, ViewPart):
            _part_forward(args, part, part.rows(out), part.stats(lse))
        else:
            padded_out = out.new_empty((*part.q.shape[:3], args.head_dim_v))
            padded_lse = lse.new_empty((part.batch, args.heads, part.seqlen_q))
            _part_forward(args, part, padded_out, padded_lse)
            part.put_rows(out, padded_out)
            part.put_stats(lse, padded_lse)
    return out, lse


def empty_results(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """Uninitialised out and lse with the strides that callers and fakes expect."""
    q = args.q
    if args.head_dim_v == args.head_dim:
        out = torch.empty_like(q)
    else:
        out = q.new_empty((*q.shape[:-1], args.head_dim_v))
    shape = (args.heads, q.shape[0]) if args.packed else (q.shape[0], args.heads, q.shape[1])
    return out, q.new_empty(shape, dtype=args.compute_dtype)


def _reduce_to(x: Tensor, target: Tensor) -> Tensor:
    """Sums the dimensions in which target has size 1."""
    dims = [d for d in range(x.dim()) if target.shape[d] == 1 and x.shape[d] != 1]
    return x.sum(dims, keepdim=True) if dims else x


def _bias_view(dbias: Tensor | None, part: Part) -> Tensor | None:
    """The view of the bias' gradient that belongs to a part."""
    if dbias is None:
        return None
    dbias = dbias[(None,) * (4 - dbias.dim())]
    if not isinstance(part, ViewPart) or part.sequence is None:
        return dbias
    return bias_of(dbias, part.sequence, part.seqlen_q, part.seqlen_k)


class _PartGradients(NamedTuple):
    """Gradients of one part, in the dtype of computation; dq is written as it comes."""

    dq: Tensor  # (batch, seqlen_q, heads, head_dim)
    dk: Tensor  # (batch * heads_k, seqlen_k, head_dim)
    dv: Tensor  # (batch * heads_k, seqlen_k, head_dim_v)
    dbias: Tensor | None  # of part.bias' shape
    dsinks: Tensor | None  # (heads,)


def _part_backward(
    args: AttentionArgs, part: Part, grad: BackwardArgs, delta: Tensor, target: _PartGradients
) -> None:
    """Adds the gradients of a part. delta (batch, heads, seqlen_q): rowsum(dout * out) - dlse."""
    scorer = Scorer(args, part)
    sinks = None if args.sinks is None else args.sinks.to(scorer.dtype)[:, None]
    lse, dout = part.stats(grad.lse), part.rows(grad.dout)
    for block in blocks(args, part):
        b, rows = block.sequences, block.rows
        dq = target.dq[b.start : b.stop, rows.start : rows.stop]
        if len(block.columns) == 0:
            dq.zero_()
            continue
        s, tanh = scorer.scores(block)
        reference = row_lse = lse[b.start : b.stop, :, rows.start : rows.stop]
        row_delta = delta[b.start : b.stop, :, rows.start : rows.stop]
        block_dout = scorer.queries(dout, block)
        far = far_rows(row_lse)
        if far is not None:
            reference = torch.where(far, _reference_of(s.amax(-1), sinks), row_lse)
        p = s.sub_(reference.unsqueeze(-1)).exp_()
        if far is not None:
            # Everything is linear in dout and delta, which therefore take the sum of the weights.
            total = _total(p, reference, sinks)
            weight = weight_of_far_rows(far, total, reference, row_lse)
            row_delta = row_delta * weight
            block_dout = block_dout * weight.reshape(block_dout.shape[0], -1, 1)
        if target.dsinks is not None and sinks is not None:
            # lse is +inf where a row sees no key.
            target.dsinks.sub_((torch.exp(sinks - reference) * row_delta).sum(dim=(0, 2)))
        flat = (-1, len(block.rows) * (args.heads // args.heads_k), len(block.columns))
        dp = block_dout @ scorer.of_block(scorer.values, block).transpose(1, 2)
        dp = scorer.by_head(dp, block)
        dropout = scorer.dropout(block)
        if dropout is not None:
            dp.mul_(dropout)
            dropped = dropout.mul_(p)
        else:
            dropped = p
        scorer.of_block(target.dv, block).add_(dropped.view(flat).transpose(1, 2) @ block_dout)
        ds = dp.sub_(row_delta.unsqueeze(-1)).mul_(p)
        if target.dbias is not None:
            block_dbias = scorer.bias(target.dbias, block)
            block_dbias.add_(_reduce_to(ds, block_dbias))
        if tanh is not None:
            ds.mul_(tanh.square_().neg_().add_(1.0))
        ds = ds.mul_(args.softmax_scale).view(flat)
        dq.copy_(scorer.ungrouped(ds @ scorer.of_block(scorer.keys, block), block))
        block_q = scorer.queries(part.q, block)
        scorer.of_block(target.dk, block).add_(ds.transpose(1, 2) @ block_q)


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
    for part in parts_of(args):
        delta = (part.rows(grad.dout).to(dtype) * part.rows(grad.out)).sum(-1).transpose(1, 2)
        if grad.dlse is not None:
            delta = delta - part.stats(grad.dlse)
        in_place = isinstance(part, ViewPart)
        heads = part.batch * args.heads_k
        target = _PartGradients(
            part.rows(dq) if in_place else torch.zeros_like(part.q),
            delta.new_zeros((heads, part.seqlen_k, args.head_dim)),
            delta.new_zeros((heads, part.seqlen_k, args.head_dim_v)),
            _bias_view(dbias, part),
            dsinks,
        )
        _part_backward(args, part, grad, delta, target)
        if not in_place:
            part.put_rows(dq, target.dq)
        for gradient, value in ((dk, target.dk), (dv, target.dv)):
            by_head = value.view(part.batch, args.heads_k, part.seqlen_k, value.shape[-1])
            part.put_keys(gradient, by_head.transpose(1, 2))
    if dbias is not None:
        dbias = torch.empty_like(args.bias).copy_(dbias)  # type: ignore[arg-type]
    if dsinks is not None:
        dsinks = dsinks.to(args.sinks.dtype)  # type: ignore[union-attr]
    return Gradients(dq, dk, dv, dbias, dsinks)
