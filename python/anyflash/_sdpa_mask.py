"""Masks that say where the keys of a sequence begin and end, as leftpad_k and seqused_k say it.

A batch of unequal lengths, or a cache that is longer than what it holds, comes to
scaled_dot_product_attention as a mask over all keys. Kernels that know the ends need not read it,
nor what it hides: seen, a decode step over half of a cache takes a fraction of the time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Elements of the keys, times rows of queries and some more, below which looking at a mask, a tenth
#: or two of a millisecond, costs more than it saves.
_LEAST_WORK = 1 << 23


class KeyRanges(NamedTuple):
    """Of each sequence the keys from leftpad_k to seqused_k are visible, (batch,) int32 both; with
    is_causal, to its query i those up to i + seqused_k - seqlen_q."""

    leftpad_k: Tensor
    seqused_k: Tensor
    is_causal: bool


def key_ranges(mask: Tensor, q: Tensor, k: Tensor) -> KeyRanges | None:
    """What a mask says of a call; None: it is no such mask, or looking at it does not pay.

    Args:
        mask: (seqlen_q, seqlen_k) or (batch, heads, seqlen_q, seqlen_k), or what broadcasts to
            them: 0 where a key is visible, -inf where not; other masks are none of these.
        q: (batch, heads, seqlen_q, head_dim).
        k: (batch, heads_k, seqlen_k, head_dim).
    """
    batch, seqlen_k = k.size(0), k.size(2)
    if mask.dim() == 2:
        mask = mask[None, None]
    if k.numel() * (q.size(2) + 32) < _LEAST_WORK or mask.dim() != 4 or mask.numel() == 0:
        return None
    if not _is_one(mask, 1) or mask.size(3) != seqlen_k:
        return None
    rows = mask[:, 0, :1] if _is_one(mask, 2) else mask[:, 0]
    last = rows[:, -1]
    # A guess, then the mask as it would be: what is neither 0 nor -inf, or has holes, differs.
    begin = last.argmax(1, keepdim=True)  # the first 0
    end = begin + (seqlen_k - last.isneginf().sum(1, keepdim=True))
    place = torch.arange(seqlen_k, device=mask.device)
    expected = _additive((place >= begin) & (place < end), last)
    if not torch.equal(expected, last):
        return None
    is_causal = rows.size(1) > 1 and not torch.equal(rows[:, 0], last)
    if rows.size(1) > 1:
        expected = expected[:, None]
        if is_causal:
            back = torch.arange(1 - rows.size(1), 1, device=mask.device)
            reach = end[:, None] + back[:, None]
            expected = expected.where(place < reach, -torch.inf)
        if not torch.equal(expected.expand_as(rows), rows):
            return None
    leftpad_k, seqused_k = (x[:, 0].int().expand(batch).contiguous() for x in (begin, end))
    return KeyRanges(leftpad_k, seqused_k, is_causal)


def _additive(visible: Tensor, like: Tensor) -> Tensor:
    """0 where a key is visible, -inf where not, in the dtype of another mask."""
    return torch.full_like(like, -torch.inf).masked_fill_(visible, 0.0)


def _is_one(mask: Tensor, dim: int) -> bool:
    """Whether a dimension holds the same again and again."""
    return mask.size(dim) == 1 or mask.stride(dim) == 0
