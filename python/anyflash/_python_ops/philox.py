"""The dropout bits, defined once for every back end (kernels/philox.h): Philox-4x32 with 7 rounds,
composed from int64 tensors.

One call gives 8 halves of 16 bits and serves the rows {i, i + 8} and columns {j, j + 1, j + 8, j +
9} of a 16 x 16 tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
_MASK = 0xFFFFFFFF
TILE = 16


def threshold(dropout_p: float) -> int:
    """Halves below it are dropped."""
    return min(math.floor(dropout_p * 65536.0 + 0.5), 65535)


def _high(product: Tensor) -> Tensor:
    """The upper word of a 32 x 32 bit product, which int64 holds modulo 2**64."""
    return (product >> 32) & _MASK


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], rng_state: Tensor) -> list[Tensor]:
    """Four words for each counter.

    Args:
        counter: int64 tensors with values below 2**32 that broadcast against each other.
        rng_state: (2,) int64: seed, offset. Read on its device.

    Returns:
        Four int64 tensors with values below 2**32.
    """
    c0, c1, c2, c3 = counter
    key0 = rng_state[0] & _MASK
    key1 = _high(rng_state[0])
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            _high(product1) ^ c1 ^ key0,
            product1 & _MASK,
            _high(product0) ^ c3 ^ key1,
            product0 & _MASK,
        )
        key0 = (key0 + _KEY_INCREMENTS[0]) & _MASK
        key1 = (key1 + _KEY_INCREMENTS[1]) & _MASK
    return [c0, c1, c2, c3]


def keep_mask(
    rng_state: Tensor,
    dropout_p: float,
    sequences: range,
    heads: int,
    rows: range,
    columns: range,
) -> Tensor:
    """Which probabilities survive dropout.

    Args:
        rng_state: (2,) int64 seed and offset, on the device of the result.
        dropout_p: probability of being dropped, in [0, 1).
        sequences: indices of sequences in the batch.
        heads: number of query heads.
        rows: queries, relative to their sequence; starts at a multiple of 16.
        columns: keys, relative to their sequence.

    Returns:
        bool (len(sequences), heads, len(rows), len(columns)).
    """
    device = rng_state.device
    row_tiles = range(rows.start // TILE, -(-rows.stop // TILE))
    column_tiles = range(columns.start // TILE, -(-columns.stop // TILE))
    num_heads = len(sequences) * heads

    def numbers(first: int, count: int, *shape: int) -> Tensor:
        return torch.arange(first, first + count, dtype=torch.int64, device=device).view(shape)

    words = philox(
        (
            numbers(column_tiles.start * 4, len(column_tiles) * 4, 1, 1, -1),
            numbers(row_tiles.start * 8, len(row_tiles) * 8, 1, -1, 1),
            numbers(sequences.start * heads, num_heads, -1, 1, 1),
            rng_state[1] & _MASK,
        ),
        rng_state,
    )
    least = threshold(dropout_p)
    # (head, row tile, row % 8, column tile, column % 8 / 2) for each of the eight halves
    tiled = (num_heads, len(row_tiles), 8, len(column_tiles), 4)
    kept = [
        half.expand(num_heads, len(row_tiles) * 8, len(column_tiles) * 4).reshape(tiled)
        for word in words
        for half in ((word & 0xFFFF) >= least, (word >> 16) >= least)
    ]
    # half number = (row % 16 / 8) * 4 + (column % 16 / 8) * 2 + column % 2
    tiles = torch.stack(kept, dim=-1).view(*tiled, 2, 2, 2).permute(0, 1, 5, 2, 3, 6, 4, 7)
    mask = tiles.reshape(len(sequences), heads, len(row_tiles) * TILE, len(column_tiles) * TILE)
    row_begin = rows.start - row_tiles.start * TILE
    column_begin = columns.start - column_tiles.start * TILE
    return mask[..., row_begin : row_begin + len(rows), column_begin : column_begin + len(columns)]
