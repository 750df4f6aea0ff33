"""The scores that exist at one time, and which of them a mask hides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import philox
from .arguments import AttentionArgs
from .parts import Part

_BLOCK_BYTES = 64 << 20  # of one block of scores


class Block(NamedTuple):
    """The scores that exist at one time: some sequences, all heads, some rows, some columns."""

    sequences: range
    rows: range
    columns: range


def blocks(args: AttentionArgs, part: Part) -> Iterator[Block]:
    """Blocks of at most _BLOCK_BYTES where possible, chunks starting at multiples of 16 rows."""
    if part.seqlen_q == 0 or part.batch == 0:
        return
    size = 8 if args.compute_dtype == torch.float64 else 4
    rows = max(_BLOCK_BYTES // (size * max(args.heads * part.seqlen_k, 1)), philox.TILE)
    batch = min(max(rows // philox.TILE, 1), part.batch)
    chunk = max(rows // batch // philox.TILE * philox.TILE, philox.TILE)
    for b in range(0, part.batch, batch):
        sequences = range(b, min(b + batch, part.batch))
        for i in range(0, part.seqlen_q, chunk):
            chunk_rows = range(i, min(i + chunk, part.seqlen_q))
            yield Block(sequences, chunk_rows, _columns(args, part, chunk_rows))


def _columns(args: AttentionArgs, part: Part, rows: range) -> range:
    """The keys that any of the rows sees; all where the lengths are on the device."""
    begin, end = 0, part.seqlen_k
    if part.len_q is None and part.len_k is None:
        shift = part.seqlen_k - part.seqlen_q
        if args.window_left >= 0:
            begin = max(begin, rows[0] + shift - args.window_left)
        if args.window_right >= 0:
            end = min(end, rows[-1] + shift + args.window_right + 1)
    return range(begin, max(begin, end))


class Masks:
    """What the interval mask, the lengths and the bias say of the blocks of one part."""

    def __init__(self, args: AttentionArgs, part: Part) -> None:
        self.args = args
        self.part = part
        self.device = part.q.device

    def positions(self, block: Block) -> tuple[Tensor, Tensor]:
        """Each row's aligned position i + shift, (sequences or 1, 1, rows, 1), and the columns (1,
        1, 1, columns)."""
        part = self.part
        rows = torch.arange(block.rows.start, block.rows.stop, device=self.device)
        columns = torch.arange(block.columns.start, block.columns.stop, device=self.device)
        rows = rows.view(1, 1, -1, 1)
        len_q = part.seqlen_q if part.len_q is None else part.len_q
        len_k = part.seqlen_k if part.len_k is None else part.len_k
        shift = len_k - len_q
        if isinstance(shift, Tensor):  # one for each sequence
            shift = shift[block.sequences.start : block.sequences.stop].view(-1, 1, 1, 1)
        return rows + shift, columns.view(1, 1, 1, -1)

    def visible(self, block: Block) -> Tensor | None:
        """Where the interval mask and the lengths let a row see a column; None: everywhere."""
        args, part = self.args, self.part
        if part.len_q is None and part.len_k is None:
            shift = part.seqlen_k - part.seqlen_q
            cut_left = (
                args.window_left >= 0
                and block.rows[-1] + shift - args.window_left > block.columns.start
            )
            cut_right = (
                args.window_right >= 0
                and block.rows[0] + shift + args.window_right + 1 < block.columns.stop
            )
        else:
            cut_left, cut_right = args.window_left >= 0, args.window_right >= 0
        conditions = []
        if cut_left or cut_right:
            position, columns = self.positions(block)
            conditions += [columns >= position - args.window_left] if cut_left else []
            conditions += [columns <= position + args.window_right] if cut_right else []
        sequences = slice(block.sequences.start, block.sequences.stop)
        if part.len_k is not None:
            columns = torch.arange(block.columns.start, block.columns.stop, device=self.device)
            conditions.append(columns < part.len_k[sequences].view(-1, 1, 1, 1))
        if part.len_q is not None:
            rows = torch.arange(block.rows.start, block.rows.stop, device=self.device)
            conditions.append(rows.view(-1, 1) < part.len_q[sequences].view(-1, 1, 1, 1))
        if not conditions:
            return None
        mask = conditions[0]
        for condition in conditions[1:]:
            mask = mask & condition
        return mask

    def bias(self, bias: Tensor, block: Block) -> Tensor:
        """The view of a four-dimensional bias, or of its gradient, that belongs to a block."""
        for dim, part in ((0, block.sequences), (2, block.rows), (3, block.columns)):
            if bias.shape[dim] > 1:
                bias = bias.narrow(dim, part.start, len(part))
        return bias
