"""Problems whose lengths are known on the device alone: packed, paged and shortened storage as one
padded batch, without a host sync."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import AttentionArgs
from .dense_mask import INFINITY, DenseBatch
from .lengths import key_spans


@dataclass
class RowMap:
    """Where the sequences of a padded batch lie in a flat storage of ``total`` rows."""

    total: int
    bounds: Tensor  # (batch + 1,) int64: which rows belong to which sequence; the end is not read
    start: Tensor  # (batch,) int64: the row that becomes row 0
    length: Tensor  # (batch,) int64: rows of each sequence that exist
    seqlen: int  # rows of each sequence in the padded batch

    def gather(self, flat: Tensor) -> Tensor:
        """(total, ...) -> (batch, seqlen, ...), zero beyond the lengths."""
        if self.total == 0:
            return flat.new_zeros((self.start.shape[0], self.seqlen, *flat.shape[1:]))
        position = torch.arange(self.seqlen, device=flat.device)
        valid = position < self.length[:, None]
        index = (self.start[:, None] + position).clamp_(0, self.total - 1)
        trailing = (1,) * (flat.dim() - 1)
        return flat[index].masked_fill_(~valid.view(*valid.shape, *trailing), 0)

    def scatter(self, padded: Tensor, fill: float) -> Tensor:
        """The inverse of gather, itself a gather so that nothing depends on an order; ``fill``
        elsewhere."""
        shape = (self.total, *padded.shape[2:])
        if self.seqlen == 0 or padded.shape[0] == 0:
            return padded.new_full(shape, fill)
        row = torch.arange(self.total, device=padded.device)
        sequence = torch.searchsorted(self.bounds[1:-1].contiguous(), row, right=True)
        position = row - self.start[sequence]
        valid = (position >= 0) & (position < self.length[sequence]) & (position < self.seqlen)
        rows = padded[sequence, position.clamp_(0, self.seqlen - 1)]
        return rows.masked_fill_(~valid.view(-1, *(1,) * (rows.dim() - 1)), fill)


@dataclass
class PaddedBatch(DenseBatch):
    """All sequences of a problem; tensors that are not dense already are gathered into padded
    ones."""

    query_rows: RowMap | None = None
    key_rows: RowMap | None = None

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor if self.query_rows is None else self.query_rows.gather(tensor)

    def stats(self, tensor: Tensor) -> Tensor:
        if self.query_rows is None:
            return tensor
        return self.query_rows.gather(tensor.transpose(0, 1)).transpose(1, 2)

    def put_rows(self, target: Tensor, value: Tensor) -> None:
        storage = self.query_rows
        target.copy_(value if storage is None else storage.scatter(value, 0.0))

    def put_stats(self, target: Tensor, value: Tensor) -> None:
        storage = self.query_rows
        if storage is not None:
            value = storage.scatter(value.transpose(1, 2), INFINITY).transpose(0, 1)
        target.copy_(value)

    def put_keys(self, target: Tensor, value: Tensor) -> None:
        storage = self.key_rows
        target.copy_(value if storage is None else storage.scatter(value, 0.0).view_as(target))


def _key_rows(args: AttentionArgs, total: int) -> RowMap | None:
    """Where the keys of each sequence lie; None for dense ones of full length."""
    if args.cu_seqlens_k is None and args.seqused_k is None and args.leftpad_k is None:
        return None
    first, length = key_spans(args)
    if args.cu_seqlens_k is not None and not args.paged:
        bounds = args.cu_seqlens_k.long()
    else:
        bounds = torch.arange(args.batch + 1, device=args.q.device) * args.longest_k
        first = bounds[:-1] + first
    return RowMap(total, bounds, first, length, args.longest_k)


def _from_pages(cache: Tensor, table: Tensor) -> Tensor:
    """(batch, max_blocks * page_size, heads_k, ...). A table entry beyond the used length may be
    anything: clamped, its rows are unused."""
    if cache.shape[0] == 0:
        return cache.new_zeros((table.shape[0], table.shape[1] * cache.shape[1], *cache.shape[2:]))
    return cache[table.long().clamp(0, cache.shape[0] - 1)].flatten(1, 2)


def padded_batch(args: AttentionArgs, slopes: Tensor | None, bias: Tensor | None) -> PaddedBatch:
    """The whole problem, without reading a length. slopes (batch or 1, heads); bias of four
    dimensions."""
    q, k, v = args.q, args.k, args.v
    if args.block_table is not None:
        k, v = (_from_pages(x, args.block_table) for x in (k, v))
    rows = None
    if args.cu_seqlens_q is not None:
        bounds = args.cu_seqlens_q.long()
        rows = RowMap(q.shape[0], bounds, bounds[:-1], bounds.diff(), args.longest_q)
        q = rows.gather(q)
    dense_keys = args.paged or args.cu_seqlens_k is None
    keys = _key_rows(args, k.shape[0] * k.shape[1] if dense_keys else k.shape[0])
    if keys is not None:
        k, v = (keys.gather(x.flatten(0, 1) if dense_keys else x) for x in (k, v))
    return PaddedBatch(
        q=q,
        k=k,
        v=v,
        first_sequence=0,
        alibi_slopes=slopes,
        bias=bias,
        len_q=None if rows is None else rows.length,
        len_k=None if keys is None else keys.length,
        query_rows=rows,
        key_rows=keys,
    )
