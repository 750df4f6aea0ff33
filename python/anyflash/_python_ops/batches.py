"""A problem as dense batches, so that no back end sees cu_seqlens, pages or paddings. On the CPU
sequence by sequence, with exact lengths; elsewhere padded, so that no length has to come to the
host."""

from __future__ import annotations

from collections.abc import Iterator

from .arguments import AttentionArgs
from .dense_mask import DenseBatch
from .padded import padded_batch
from .results import four_dims
from .runs import Run, runs_of


def batches_of(args: AttentionArgs) -> Iterator[DenseBatch]:
    """The dense problems that an attention problem consists of."""
    slopes, bias = args.alibi_slopes, None if args.bias is None else four_dims(args.bias)
    if slopes is not None and slopes.dim() == 1:
        slopes = slopes.unsqueeze(0)
    if covers_everything(args):
        yield Run(args.q, args.k, args.v, 0, slopes, bias)
    elif args.q.device.type == "cpu":
        yield from runs_of(args, slopes, bias)
    elif args.batch > 0:
        yield padded_batch(args, slopes, bias)


def covers_everything(args: AttentionArgs) -> bool:
    """True when the batches write every row of out and every key's gradient."""
    lengths = (args.cu_seqlens_q, args.block_table, args.seqused_k, args.leftpad_k)
    return all(tensor is None for tensor in lengths)
