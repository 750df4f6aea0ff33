"""kernels/lengths.h for tensors: which keys of each sequence its queries may see."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import AttentionArgs


def key_spans(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """(batch,) int64 each: the first visible key, a row of packed storage or else of the sequence's
    own, and how many there are."""
    cu_seqlens, device = args.cu_seqlens_k, args.q.device
    if args.seqused_k is not None:
        length = args.seqused_k.long()
    elif cu_seqlens is not None:
        length = cu_seqlens.long().diff()
    else:
        length = torch.full((args.batch,), args.longest_k, dtype=torch.int64, device=device)
    if cu_seqlens is not None and not args.paged:
        first = cu_seqlens[:-1].long()
    else:
        first = torch.zeros_like(length)
    if args.leftpad_k is not None:
        first, length = first + args.leftpad_k, length - args.leftpad_k
    return first, length.clamp(min=0)
