"""Cuts a problem into dense ones, so that no back end sees cu_seqlens, pages or paddings.

On the CPU lengths can be read, and every sequence becomes a part made of views. Elsewhere reading
them would wait for the device, so one part holds all sequences, gathered into padded tensors with
indices computed on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import AttentionArgs

INFINITY = float("inf")


@dataclass
class Part:
    """A dense problem: q (batch, seqlen_q, heads, head_dim), k and v (batch, seqlen_k, heads_k,
    ...).

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
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def seqlen_q(self) -> int:
        return self.q.shape[1]

    @property
    def seqlen_k(self) -> int:
        return self.k.shape[1]

    def rows(self, tensor: Tensor) -> Tensor:
        """Of a tensor of out's shape, this part's rows: (batch, seqlen_q, heads, head_dim_v)."""
        raise NotImplementedError

    def stats(self, tensor: Tensor) -> Tensor:
        """Of a tensor of lse's shape, this part's entries: (batch, heads, seqlen_q)."""
        raise NotImplementedError

    def put_rows(self, target: Tensor, value: Tensor) -> None:
        """Writes what rows() reads."""
        raise NotImplementedError

    def put_stats(self, target: Tensor, value: Tensor) -> None:
        """Writes what stats() reads."""
        raise NotImplementedError

    def put_keys(self, target: Tensor, value: Tensor) -> None:
        """Writes (batch, seqlen_k, heads_k, ...) into a tensor of k's or v's shape."""
        raise NotImplementedError


@dataclass
class ViewPart(Part):
    """A part whose tensors are views: a whole dense batch, or one sequence."""

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
        """Of a tensor of k's or v's shape, this part's keys."""
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


def _four_dimensions(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias[(None,) * (4 - bias.dim())]


def bias_of(bias: Tensor | None, sequence: int, seqlen_q: int, seqlen_k: int) -> Tensor | None:
    """The view of a four-dimensional bias that belongs to one sequence."""
    if bias is None:
        return None
    if bias.shape[0] > 1:
        bias = bias[sequence : sequence + 1]
    bias = bias[:, :, :seqlen_q] if bias.shape[2] > 1 else bias
    return bias[..., :seqlen_k] if bias.shape[3] > 1 else bias


def _slopes(args: AttentionArgs) -> Tensor | None:
    slopes = args.alibi_slopes
    return slopes if slopes is None or slopes.dim() == 2 else slopes.unsqueeze(0)


def _pages(cache: Tensor, table: list[int], length: int) -> Tensor:
    """The first ``length`` rows of one sequence, gathered: (length, heads_k, ...)."""
    count = -(-length // max(cache.shape[1], 1))  # of empty pages there are none to gather
    index = torch.tensor(table[:count], dtype=torch.int64)
    return cache.index_select(0, index).flatten(0, 1)[:length]


def _sequences(args: AttentionArgs) -> Iterator[ViewPart]:
    """One part for each sequence, lengths read on the host."""
    slopes, bias = _slopes(args), _four_dimensions(args.bias)
    cu_q = None if args.cu_seqlens_q is None else args.cu_seqlens_q.tolist()
    cu_k = None if args.cu_seqlens_k is None else args.cu_seqlens_k.tolist()
    used = None if args.seqused_k is None else args.seqused_k.tolist()
    leftpad = None if args.leftpad_k is None else args.leftpad_k.tolist()
    table = None if args.block_table is None else args.block_table.tolist()
    for b in range(args.batch):
        rows = None if cu_q is None else range(cu_q[b], cu_q[b + 1])
        first = 0 if cu_k is None or table is not None else cu_k[b]
        end = args.max_seqlen_k
        if used is not None:  # by the rule of kernels/lengths.h, as _key_storage
            end = used[b]
        elif cu_k is not None:
            end = cu_k[b + 1] - cu_k[b]
        begin = 0 if leftpad is None else min(leftpad[b], end)
        part = ViewPart(
            q=args.q[b : b + 1] if rows is None else args.q[rows.start : rows.stop].unsqueeze(0),
            k=args.k,
            v=args.v,
            first_sequence=b,
            alibi_slopes=slopes if slopes is None or len(slopes) == 1 else slopes[b : b + 1],
            bias=None,
            row_range=rows,
            sequence=b,
            key_range=range(first + begin, first + end),
        )
        if table is None:
            part.k, part.v = part.keys(args.k), part.keys(args.v)
        else:
            part.k = _pages(args.k, table[b], end)[begin:].unsqueeze(0)
            part.v = _pages(args.v, table[b], end)[begin:].unsqueeze(0)
        part.bias = bias_of(bias, b, part.seqlen_q, part.seqlen_k)
        yield part


@dataclass
class Storage:
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
class PaddedPart(Part):
    """All sequences of a problem; tensors that are not dense already are gathered into padded
    ones."""

    row_storage: Storage | None = None
    key_storage: Storage | None = None

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor if self.row_storage is None else self.row_storage.gather(tensor)

    def stats(self, tensor: Tensor) -> Tensor:
        if self.row_storage is None:
            return tensor
        return self.row_storage.gather(tensor.transpose(0, 1)).transpose(1, 2)

    def put_rows(self, target: Tensor, value: Tensor) -> None:
        storage = self.row_storage
        target.copy_(value if storage is None else storage.scatter(value, 0.0))

    def put_stats(self, target: Tensor, value: Tensor) -> None:
        storage = self.row_storage
        if storage is not None:
            value = storage.scatter(value.transpose(1, 2), INFINITY).transpose(0, 1)
        target.copy_(value)

    def put_keys(self, target: Tensor, value: Tensor) -> None:
        storage = self.key_storage
        target.copy_(value if storage is None else storage.scatter(value, 0.0).view_as(target))


def _key_storage(args: AttentionArgs, total: int) -> Storage | None:
    """Where the keys of each sequence lie; None for dense ones of full length."""
    device, batch = args.q.device, args.batch
    if args.cu_seqlens_k is not None and not args.paged:
        bounds = args.cu_seqlens_k.long()
    else:
        bounds = torch.arange(batch + 1, device=device) * args.longest_k
    if args.seqused_k is not None:
        length = args.seqused_k.long()
    elif args.cu_seqlens_k is not None:
        length = args.cu_seqlens_k.long().diff()
    elif args.leftpad_k is not None:
        length = torch.full((batch,), args.longest_k, dtype=torch.int64, device=device)
    else:
        return None
    start = bounds[:-1]
    if args.leftpad_k is not None:
        start, length = start + args.leftpad_k, length - args.leftpad_k
    return Storage(total, bounds, start, length.clamp(min=0), args.longest_k)


def _padded(args: AttentionArgs) -> PaddedPart:
    """One part with everything, without reading a length."""
    q, k, v = args.q, args.k, args.v
    if args.block_table is not None:
        table = args.block_table.long().clamp(0, max(k.shape[0] - 1, 0))
        k, v = k[table].flatten(1, 2), v[table].flatten(1, 2)
    rows = None
    if args.cu_seqlens_q is not None:
        bounds = args.cu_seqlens_q.long()
        rows = Storage(q.shape[0], bounds, bounds[:-1], bounds.diff(), args.longest_q)
        q = rows.gather(q)
    dense_keys = args.paged or args.cu_seqlens_k is None
    keys = _key_storage(args, k.shape[0] * k.shape[1] if dense_keys else k.shape[0])
    if keys is not None:
        k, v = (keys.gather(x.flatten(0, 1) if dense_keys else x) for x in (k, v))
    return PaddedPart(
        q=q,
        k=k,
        v=v,
        first_sequence=0,
        alibi_slopes=_slopes(args),
        bias=_four_dimensions(args.bias),
        len_q=None if rows is None else rows.length,
        len_k=None if keys is None else keys.length,
        row_storage=rows,
        key_storage=keys,
    )


def parts_of(args: AttentionArgs) -> Iterator[Part]:
    """The dense problems that an attention problem consists of."""
    if covers_everything(args):
        slopes, bias = _slopes(args), _four_dimensions(args.bias)
        yield ViewPart(args.q, args.k, args.v, 0, slopes, bias)
    elif args.q.device.type == "cpu":
        yield from _sequences(args)
    elif args.batch > 0:
        yield _padded(args)


def covers_everything(args: AttentionArgs) -> bool:
    """True when the parts write every row of out and every key's gradient."""
    lengths = (args.cu_seqlens_q, args.block_table, args.seqused_k, args.leftpad_k)
    return all(tensor is None for tensor in lengths)
