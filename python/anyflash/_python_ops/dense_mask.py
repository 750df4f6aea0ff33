"""One dense batch, and which keys its rows see, a chunk of rows at a time. Any device, no host
sync."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import philox
from .arguments import AttentionArgs

INFINITY = float("inf")
_SCORE_BYTES = 64 << 20  # of one chunk


@dataclass
class DenseBatch(abc.ABC):
    """Some sequences of a problem, padded where their lengths differ: q (batch, seqlen_q, heads,
    head_dim), k and v (batch, seqlen_k, heads_k, ...).

    ``len_q`` and ``len_k`` (batch,) int64 tell how many rows of each sequence exist; None: all. k
    and v are zero beyond them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    first_sequence: int
    alibi_slopes: Tensor | None  # (batch or 1, heads)
    bias: Tensor | None  # 4 dimensions, each the problem's or 1
    len_q: Tensor | None = None
    len_k: Tensor | None = None

    @property
    def sequences(self) -> int:
        return self.q.shape[0]

    @property
    def seqlen_q(self) -> int:
        return self.q.shape[1]

    @property
    def seqlen_k(self) -> int:
        return self.k.shape[1]

    @abc.abstractmethod
    def rows(self, tensor: Tensor) -> Tensor:
        """Of a tensor of out's shape, this batch's rows: (batch, seqlen_q, heads, head_dim_v)."""

    @abc.abstractmethod
    def stats(self, tensor: Tensor) -> Tensor:
        """Of a tensor of lse's shape, this batch's entries: (batch, heads, seqlen_q)."""

    @abc.abstractmethod
    def put_rows(self, target: Tensor, value: Tensor) -> None:
        """Writes what rows() reads."""

    @abc.abstractmethod
    def put_stats(self, target: Tensor, value: Tensor) -> None:
        """Writes what stats() reads."""

    @abc.abstractmethod
    def put_keys(self, target: Tensor, value: Tensor) -> None:
        """Writes (batch, seqlen_k, heads_k, ...) into a tensor of k's or v's shape."""


class Chunk(NamedTuple):
    """The scores that exist at one time: some sequences, all heads, some rows, some columns."""

    sequences: range
    rows: range
    columns: range


def chunks(args: AttentionArgs, batch: DenseBatch) -> Iterator[Chunk]:
    """Chunks of at most _SCORE_BYTES where possible, starting at multiples of 16 rows."""
    if batch.seqlen_q == 0 or batch.sequences == 0:
        return
    size = 8 if args.compute_dtype == torch.float64 else 4
    rows = max(_SCORE_BYTES // (size * max(args.heads * batch.seqlen_k, 1)), philox.TILE)
    step = min(max(rows // philox.TILE, 1), batch.sequences)
    count = max(rows // step // philox.TILE * philox.TILE, philox.TILE)
    for b in range(0, batch.sequences, step):
        sequences = range(b, min(b + step, batch.sequences))
        for i in range(0, batch.seqlen_q, count):
            rows_here = range(i, min(i + count, batch.seqlen_q))
            yield Chunk(sequences, rows_here, _columns(args, batch, rows_here))


def _columns(args: AttentionArgs, batch: DenseBatch, rows: range) -> range:
    """The keys that any of the rows sees; all where the lengths are on the device."""
    begin, end = 0, batch.seqlen_k
    if batch.len_q is None and batch.len_k is None:
        shift = batch.seqlen_k - batch.seqlen_q
        if args.window_left >= 0:
            begin = max(begin, rows[0] + shift - args.window_left)
        if args.window_right >= 0:
            end = min(end, rows[-1] + shift + args.window_right + 1)
    return range(begin, max(begin, end))


class DenseMask:
    """What the interval mask, the lengths and the bias say of the chunks of one batch."""

    def __init__(self, args: AttentionArgs, batch: DenseBatch) -> None:
        self.args = args
        self.batch = batch
        self.device = batch.q.device

    def positions(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Each row's aligned position i + shift, (sequences or 1, 1, rows, 1), and the columns (1,
        1, 1, columns)."""
        batch = self.batch
        rows = torch.arange(chunk.rows.start, chunk.rows.stop, device=self.device)
        columns = torch.arange(chunk.columns.start, chunk.columns.stop, device=self.device)
        rows = rows.view(1, 1, -1, 1)
        len_q = batch.seqlen_q if batch.len_q is None else batch.len_q
        len_k = batch.seqlen_k if batch.len_k is None else batch.len_k
        shift = len_k - len_q
        if isinstance(shift, Tensor):  # one for each sequence
            shift = shift[chunk.sequences.start : chunk.sequences.stop].view(-1, 1, 1, 1)
        return rows + shift, columns.view(1, 1, 1, -1)

    def visible(self, chunk: Chunk) -> Tensor | None:
        """Where the interval mask and the lengths let a row see a column; None: everywhere."""
        args, batch = self.args, self.batch
        if batch.len_q is None and batch.len_k is None:
            shift = batch.seqlen_k - batch.seqlen_q
            cut_left = (
                args.window_left >= 0
                and chunk.rows[-1] + shift - args.window_left > chunk.columns.start
            )
            cut_right = (
                args.window_right >= 0
                and chunk.rows[0] + shift + args.window_right + 1 < chunk.columns.stop
            )
        else:
            cut_left, cut_right = args.window_left >= 0, args.window_right >= 0
        conditions = []
        if cut_left or cut_right:
            position, columns = self.positions(chunk)
            conditions += [columns >= position - args.window_left] if cut_left else []
            conditions += [columns <= position + args.window_right] if cut_right else []
        sequences = slice(chunk.sequences.start, chunk.sequences.stop)
        if batch.len_k is not None:
            columns = torch.arange(chunk.columns.start, chunk.columns.stop, device=self.device)
            conditions.append(columns < batch.len_k[sequences].view(-1, 1, 1, 1))
        if batch.len_q is not None:
            rows = torch.arange(chunk.rows.start, chunk.rows.stop, device=self.device)
            conditions.append(rows.view(-1, 1) < batch.len_q[sequences].view(-1, 1, 1, 1))
        if not conditions:
            return None
        mask = conditions[0]
        for condition in conditions[1:]:
            mask = mask & condition
        return mask

    def bias(self, bias: Tensor, chunk: Chunk) -> Tensor:
        """The view of a four-dimensional bias, or of its gradient, that belongs to a chunk."""
        for dim, span in ((0, chunk.sequences), (2, chunk.rows), (3, chunk.columns)):
            if bias.shape[dim] > 1:
                bias = bias.narrow(dim, span.start, len(span))
        return bias
