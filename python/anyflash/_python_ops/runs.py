"""A CPU problem as dense batches of one sequence each, made of views: lengths are read on the
host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import AttentionArgs
from .dense_mask import DenseBatch
from .lengths import key_spans


@dataclass
class Run(DenseBatch):
    """A batch whose tensors are views: a whole dense batch, or one sequence."""

    row_range: range | None = None  # of the packed storage
    sequence: int | None = None  # of the dense storage
    key_range: range | None = None

    def rows(self, tensor: Tensor) -> Tensor:
        if self.row_range is not None:
            return tensor[self.row_range.start : self.row_range.stop].unsqueeze(0)
        return tensor if self.sequence is None else tensor[self.sequence : self.sequence + 1]

    def stats(self, tensor: Tensor) -> Tensor:
        if self.row_range is not None:
            return tensor[:, self.row_range.start : self.row_range.stop].unsqueeze(0)
        return tensor if self.sequence is None else tensor[self.sequence : self.sequence + 1]

    def keys(self, tensor: Tensor) -> Tensor:
        """Of a tensor of k's or v's shape, this batch's keys."""
        if self.key_range is None:
            return tensor
        begin, end = self.key_range.start, self.key_range.stop
        if self.row_range is not None:
            return tensor[begin:end].unsqueeze(0)
        return tensor[self.sequence : self.sequence + 1, begin:end]  # type: ignore[operator]

    def put_rows(self, target: Tensor, value: Tensor) -> None:
        self.rows(target).copy_(value)

    def put_stats(self, target: Tensor, value: Tensor) -> None:
        self.stats(target).copy_(value)

    def put_keys(self, target: Tensor, value: Tensor) -> None:
        self.keys(target).copy_(value)


def bias_block(bias: Tensor | None, sequence: int, seqlen_q: int, seqlen_k: int) -> Tensor | None:
    """The view of a four-dimensional bias that belongs to one sequence."""
    if bias is None:
        return None
    if bias.shape[0] > 1:
        bias = bias[sequence : sequence + 1]
    bias = bias[:, :, :seqlen_q] if bias.shape[2] > 1 else bias
    return bias[..., :seqlen_k] if bias.shape[3] > 1 else bias


def _from_pages(cache: Tensor, table: list[int], rows: range) -> Tensor:
    """Rows of one sequence, gathered: (1, rows, heads_k, ...)."""
    # Of a page nobody needs the table may say anything; empty pages have none to gather.
    count = -(-rows.stop // max(cache.shape[1], 1)) if len(rows) else 0
    index = torch.tensor(table[:count], dtype=torch.int64)
    gathered = cache.index_select(0, index).flatten(0, 1)
    return gathered[rows.start : rows.stop].unsqueeze(0)


def runs_of(args: AttentionArgs, slopes: Tensor | None, bias: Tensor | None) -> Iterator[Run]:
    """A run for each sequence. slopes (batch or 1, heads); bias of four dimensions."""
    rows_of = None if args.cu_seqlens_q is None else args.cu_seqlens_q.tolist()
    table = None if args.block_table is None else args.block_table.tolist()
    spans = zip(*(x.tolist() for x in key_spans(args)))
    for b, (first, length) in enumerate(spans):
        rows = None if rows_of is None else range(rows_of[b], rows_of[b + 1])
        run = Run(
            q=args.q[b : b + 1] if rows is None else args.q[rows.start : rows.stop].unsqueeze(0),
            k=args.k,
            v=args.v,
            first_sequence=b,
            alibi_slopes=slopes if slopes is None or len(slopes) == 1 else slopes[b : b + 1],
            bias=None,
            row_range=rows,
            sequence=b,
            key_range=range(first, first + length),
        )
        if table is None:
            run.k, run.v = run.keys(args.k), run.keys(args.v)
        else:
            keys = range(first, first + length)
            run.k, run.v = (_from_pages(x, table[b], keys) for x in (args.k, args.v))
        run.bias = bias_block(bias, b, run.seqlen_q, run.seqlen_k)
        yield run
