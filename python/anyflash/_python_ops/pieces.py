"""Cuts one attention into calls of an attention that knows no mask, the top-left causal mask, or
an explicit one.

The same plan as csrc/fallback/pieces.cpp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

# Up to this many rows, one call with a mask is faster than two merged calls without.
_MERGE_MIN_ROWS = 32
# Rows per piece where masks are explicit: few enough to skip most invisible keys, enough to keep
# the threads busy.
_CHUNK_MIN_ROWS = 64
_CHUNK_MAX_ROWS = 512

NO_MASK = "none"  # every row sees every key
CAUSAL = "causal"  # square: row i of the piece sees its keys 0 .. i
INTERVAL = "interval"  # the element test of the IntervalMask


class IntervalMask(NamedTuple):
    """Row i sees the keys kv_begin(i) <= j < kv_end(i); both ends never decrease
    (kernels/masks.h)."""

    seqlen_q: int
    seqlen_k: int
    window_left: int  # -1: unbounded
    window_right: int  # -1: unbounded

    def kv_begin(self, row: int) -> int:
        if self.window_left < 0:
            return 0
        return max(0, row + self.seqlen_k - self.seqlen_q - self.window_left)

    def kv_end(self, row: int) -> int:
        if self.window_right < 0:
            return self.seqlen_k
        return min(self.seqlen_k, row + self.seqlen_k - self.seqlen_q + self.window_right + 1)


class Piece(NamedTuple):
    """Rows [row_begin, row_end) against keys [key_begin, key_end) of one sequence."""

    row_begin: int
    row_end: int
    key_begin: int
    key_end: int
    mask: str
    merges: bool = False  # more keys for the rows of the piece before it


class Plan(NamedTuple):
    """Pieces in the order of their rows, each visible element in exactly one; other rows see no
    key."""

    row_begin: int
    row_end: int
    pieces: tuple[Piece, ...]


class _Planner:
    def __init__(self, mask: IntervalMask, explicit_masks: bool) -> None:
        self.mask = mask
        self.explicit_masks = explicit_masks
        self.pieces: list[Piece] = []

    def first_row(self, condition: Callable[[int], bool], row: int) -> int:
        """The first row from ``row`` on for which a monotone condition holds, or seqlen_q."""
        end = self.mask.seqlen_q
        while row < end:
            middle = (row + end) // 2
            if condition(middle):
                end = middle
            else:
                row = middle + 1
        return row

    def run(self) -> Plan:
        mask = self.mask
        row_begin = self.first_row(lambda row: mask.kv_end(row) > 0, 0)
        row_end = self.first_row(lambda row: mask.kv_begin(row) >= mask.seqlen_k, 0)
        row_begin = min(row_begin, row_end)
        if self.explicit_masks:
            self.add_chunks(row_begin, row_end)
        else:
            windowed = self.first_row(lambda row: mask.kv_begin(row) > 0, row_begin)
            windowed = max(row_begin, min(windowed, row_end))
            self.add_from_first_key(row_begin, windowed)
            self.add_chunks(windowed, row_end)
        return Plan(row_begin, row_end, tuple(self.pieces))

    def add_from_first_key(self, begin: int, end: int) -> None:
        """Rows that see keys [0, kv_end(row))."""
        if begin >= end:
            return
        mask = self.mask
        # Rows before `full` see one key more than their predecessor; `full` is the first that sees
        # the last key.
        full = self.first_row(lambda row: mask.kv_end(row) == mask.seqlen_k, begin)
        if full > begin:
            growing_end = min(end, full + 1)
            self.add_growing(begin, growing_end)
            begin = growing_end
        if begin < end:
            self.pieces.append(Piece(begin, end, 0, mask.seqlen_k, NO_MASK))

    def add_growing(self, begin: int, end: int) -> None:
        common = self.mask.kv_end(begin) - 1  # keys before it are seen by all, then a triangle
        key_end = common + (end - begin)
        if common == 0:
            self.pieces.append(Piece(begin, end, 0, key_end, CAUSAL))
        elif end - begin == 1:
            self.pieces.append(Piece(begin, end, 0, key_end, NO_MASK))
        elif end - begin < _MERGE_MIN_ROWS:
            self.pieces.append(Piece(begin, end, 0, key_end, INTERVAL))
        else:
            self.pieces.append(Piece(begin, end, 0, common, NO_MASK))
            self.pieces.append(Piece(begin, end, common, key_end, CAUSAL, merges=True))

    def add_chunks(self, begin: int, end: int) -> None:
        mask = self.mask
        masked = mask.window_left >= 0 or mask.window_right >= 0
        chunk = _CHUNK_MAX_ROWS if masked else max(end - begin, 1)
        if mask.window_left >= 0:
            window = mask.window_left + max(mask.window_right, 0) + 1
            half = -(-(window // 2) // 32) * 32
            chunk = max(_CHUNK_MIN_ROWS, min(half, _CHUNK_MAX_ROWS))
        for row in range(begin, end, chunk):
            row_end = min(row + chunk, end)
            key_begin, key_end = mask.kv_begin(row), mask.kv_end(row_end - 1)
            full = mask.kv_begin(row_end - 1) == key_begin and mask.kv_end(row) == key_end
            kind = NO_MASK if full else INTERVAL
            self.pieces.append(Piece(row, row_end, key_begin, key_end, kind))


@functools.lru_cache(maxsize=4096)
def plan_pieces(mask: IntervalMask, explicit_masks: bool) -> Plan:
    """The pieces of one attention.

    Args:
        mask: lengths and window.
        explicit_masks: no causal and no merging pieces, for callers who mask the scores anyway
            (bias).
    """
    if mask.seqlen_q <= 0 or mask.seqlen_k <= 0:
        return Plan(0, 0, ())
    return _Planner(mask, explicit_masks).run()
